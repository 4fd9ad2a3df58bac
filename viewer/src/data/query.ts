import { STATISTICS, type AtomTable, type Statistic } from "./table";

export type Range = [number | null, number | null];

/** What a list shows and in which order, as a link's parameters say it. */
export interface Query {
  sort: Statistic;
  falling: boolean;
  ranges: [Statistic, Range][];
  text: string;
}

function statistic(name: string): Statistic | undefined {
  return STATISTICS.find((one) => one === name);
}

function bound(text: string | undefined): number | null {
  const value = text ? Number(text) : NaN;
  return Number.isNaN(value) ? null : value;
}

export function parseRange(text: string | undefined): Range {
  const [low, high] = (text ?? "").split("..");
  return [bound(low), bound(high)];
}

export function formatRange([low, high]: Range): string | null {
  return low === null && high === null ? null : `${low ?? ""}..${high ?? ""}`;
}

export function parseQuery(params: Record<string, string>): Query {
  const sort = params["sort"] ?? "atom";
  const ranges = STATISTICS.flatMap((name): [Statistic, Range][] => {
    const range = parseRange(params[name]);
    return formatRange(range) === null ? [] : [[name, range]];
  });
  return {
    sort: statistic(sort.replace(/^-/, "")) ?? "atom",
    falling: sort.startsWith("-"),
    ranges,
    text: params["q"] ?? "",
  };
}

function within(table: AtomTable, ranges: Query["ranges"], row: number): boolean {
  return ranges.every(([name, [low, high]]) => {
    const value = table.number(name, row);
    // An atom without the statistic is in no range of it.
    return value >= (low ?? -Infinity) && value <= (high ?? Infinity);
  });
}

/** The rows that a query selects, in its order (the table has that of atoms); those without the sorted statistic are last. */
export function select(table: AtomTable, { sort, falling, ranges, text }: Query): Uint32Array {
  const wanted = text.toLowerCase();
  const found = new Uint32Array(table.length);
  let count = 0;
  for (let row = 0; row < table.length; row += 1) {
    if (!within(table, ranges, row)) continue;
    if (wanted && !table.text(row).includes(wanted) && String(table.number("atom", row)) !== wanted.trim()) continue;
    found[count++] = row;
  }
  const rows = found.subarray(0, count);
  if (sort === "atom") return falling ? rows.reverse() : rows;
  const column = table.numbers[sort];
  const sign = falling ? -1 : 1;
  return rows.sort((one, other) => {
    const [a = NaN, b = NaN] = [column[one], column[other]];
    if (Number.isNaN(a) || Number.isNaN(b)) return Number(Number.isNaN(a)) - Number(Number.isNaN(b)) || one - other;
    return sign * (a - b) || one - other;
  });
}
