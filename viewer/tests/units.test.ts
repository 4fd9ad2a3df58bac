import { expect, test } from "vitest";
import { Cache } from "../src/data/cache";
import { parseQuery, select } from "../src/data/query";
import { AtomTable, STATISTICS } from "../src/data/table";
import type { Columns } from "../src/data/parquet";
import { Bars, ticks } from "../src/parts/chart";
import { marked, short } from "../src/parts/marks";
import { figure } from "../src/parts/number";
import { level } from "../src/parts/sequence";
import type { AtomsRow } from "../src/schemas";
import { bestMatch, link, parse } from "../src/state/route";
import { formatColumns, parseColumns, sharedContexts } from "../src/views/compare";
import { curves, densityBars } from "../src/views/dictionary";
import { deciles } from "../src/views/examples";
import { atomQuestions, listSql } from "../src/views/questions";

test.each([
  ["#/atom/demo/12?show=random", { view: "atom", name: "demo", atom: 12, params: { show: "random" } }],
  ["", { view: "atoms", name: null, atom: null, params: {} }],
  ["#/atoms/a%2Fb", { view: "atoms", name: "a/b", atom: null, params: {} }],
  ["#/atom/demo/-1", { view: "atom", name: "demo", atom: null, params: {} }],
  ["#/atom/%E0%A4%A/1", { view: "atom", name: "%E0%A4%A", atom: 1, params: {} }],
  [
    "#/model/gpt2/family/v5_32k/layer/8/location/mlp/feature/7",
    { view: "model", name: "gpt2/family/v5_32k/layer/8/location/mlp/feature", atom: 7, params: {} },
  ],
])("the link %s is read", (hash, route) => expect(parse(hash)).toEqual(route));

test("a link survives any name and parameter", () => {
  const name = "a/b ?#&=%'\"é";
  expect(parse(link("atom", name, 3, { q: name, none: null }))).toEqual({ view: "atom", name, atom: 3, params: { q: name } });
});

test("a reference link leads to the autoencoder that its words name", () => {
  const entries = [
    { name: "one", path: "gpt2/v5_32k/layer_7/mlp" },
    { name: "two", path: "gpt2/v5_32k/layer_8/mlp" },
  ];
  expect(bestMatch(entries, "gpt2/family/v5_32k/layer/8/location/mlp")?.name).toBe("two");
  expect(bestMatch(entries, "nothing/like/it")?.name).toBe("one");
  expect(bestMatch([], "x")).toBeUndefined();
});

function table(numbers: Partial<Record<(typeof STATISTICS)[number], (number | null)[]>>, tokens: string[][]): AtomTable {
  const count = tokens.length;
  const made = new AtomTable(count);
  const columns = Object.fromEntries(STATISTICS.map((name) => [name, numbers[name] ?? new Array<number>(count).fill(0)]));
  const atom = Array.from({ length: count }, (_, row) => row);
  const texts = { explanation: new Array<null>(count).fill(null), peak_tokens: tokens, logit_tokens: tokens.map(() => []) };
  made.append({ ...columns, ...texts, atom } as unknown as Columns<AtomsRow>);
  return made;
}

test("a list is sorted, filtered and searched; what has no value is last and in no range", () => {
  const atoms = table({ skew: [3, null, 1, 2] }, [[" Water"], ["<b>"], [" fire"], [" waters"]]);
  const shown = (params: Record<string, string>): number[] => [...select(atoms, parseQuery(params))];
  expect(shown({})).toEqual([0, 1, 2, 3]);
  expect(shown({ sort: "-atom" })).toEqual([3, 2, 1, 0]);
  expect(shown({ sort: "skew" })).toEqual([2, 3, 0, 1]);
  expect(shown({ sort: "-skew" })).toEqual([0, 3, 2, 1]);
  expect(shown({ skew: "2.." })).toEqual([0, 3]);
  expect(shown({ skew: "..1e0" })).toEqual([2]);
  expect(shown({ q: "WATER" })).toEqual([0, 3]);
  expect(shown({ q: "2" })).toEqual([2]);
  expect(shown({ skew: "x..y", sort: "nothing" })).toEqual([0, 1, 2, 3]);
});

test.each([
  [" word", " word"],
  ["\n\n", "↵↵"],
  ["\t", "⇥"],
  ["  ", "␣␣"],
  ["", "∅"],
  ["a\u0000b", "a␀b"],
  ["\u200f", "‹U+200F›"],
  ["\u0085", "‹U+0085›"],
  ["<script>", "<script>"],
])("what cannot be seen in %j is marked", (token, seen) => expect(marked(token)).toBe(seen));

test("a long token is cut between letters, not within one", () => {
  expect(short("x".repeat(10_000))).toBe(`${"x".repeat(40)}…`);
  expect(short("👩".repeat(100))).toBe(`${"👩".repeat(40)}…`);
  expect(short("👩".repeat(30))).toBe("👩".repeat(30));
});

test.each([
  [0.123456, "0.123"],
  [1234.5, "1,235"],
  [123456.7, "123,457"],
  [1234567.8, "1.23e6"],
  [0.00012345, "1.23e−4"],
  [-0.5, "−0.5"],
  [-0.000817, "−8.17e−4"],
  [28943, "28,943"],
  [null, "–"],
  [NaN, "–"],
])("the figure of %s", (value, text) => expect(figure(value)).toBe(text));

test("colours have ten steps and two signs", () => {
  expect(level("act", 0, 10)).toBe("");
  expect(level("act", 0.1, 10)).toBe(" a1");
  expect(level("act", 10, 10)).toBe(" a10");
  expect(level("loss", -99, 10)).toBe(" n10");
  expect(level("loss", 5, 10)).toBe(" p5");
  expect(level("kl", null, 10)).toBe("");
});

test("ticks are round and within the range", () => {
  expect(ticks(0, 7.7, 4)).toEqual([0, 2, 4, 6]);
  expect(ticks(-5, -1, 6)).toEqual([-5, -4, -3, -2, -1]);
  expect(ticks(3, 3, 4)).toEqual([3]);
});

test("columns of a comparison survive any name", () => {
  const columns = [
    { name: "a:b,c/ü", atom: 4 },
    { name: "demo", atom: 0 },
  ];
  expect(parseColumns(formatColumns(columns))).toEqual(columns);
  expect(parseColumns("")).toEqual([]);
  expect(parseColumns("%E0%A4%A:3")).toEqual([{ name: "%E0%A4%A", atom: 3 }]);
});

test("a list's SQL joins effects where they are asked for, and quotes names", () => {
  expect(listSql("o'hara", parseQuery({ sort: "-skew", density: "0.1.." }))).toBe(
    "from atoms\nwhere autoencoder = 'o''hara' and density >= 0.1\norder by skew desc nulls last\nlimit 100",
  );
  expect(listSql("demo", parseQuery({ sort: "effect_kl" }))).toContain("from effects)\n    where autoencoder = 'demo'");
  const explained = listSql("demo", parseQuery({ sort: "-explanation_score", explanation_score: "0.5.." }));
  expect(explained).toContain("from explanations where autoencoder = 'demo'");
  expect(explained).toContain("and explanation_score >= 0.5\norder by explanation_score desc");
  expect(explained).not.toContain("from effects");
});

test("an atom's SQL asks for all that its page shows", () => {
  const asked = Object.fromEntries(atomQuestions("o'hara", 3).map(({ title, sql }) => [title, sql]));
  expect(asked["Direct logits"]).toContain("from logits join");
  expect(asked["Direct logits"]).toContain("where autoencoder = 'o''hara' and atom = 3");
  expect(asked["Sources"]).toContain("group by source");
});

function example(contextId: number, act: number): Parameters<typeof deciles>[0][number] {
  return { key: "", kind: "random", act, idx: 0, tokens: [], acts: [], contextId, source: "", document: "" };
}

test("contexts of several columns are shared, those of one twice are not", () => {
  expect(sharedContexts([[example(1, 1), example(2, 1), example(2, 1)], [example(1, 1)], undefined])).toEqual(new Set([1]));
});

test("deciles hold every example once, the strongest first", () => {
  const groups = deciles(Array.from({ length: 25 }, (_, i) => example(i, i)));
  expect(groups).toHaveLength(10);
  const acts = groups.flatMap(({ examples }) => examples.map(({ act }) => act));
  expect(acts).toEqual(Array.from({ length: 25 }, (_, i) => 24 - i));
  expect(deciles([])).toEqual([]);
});

test("densities are counted by decade, dead atoms are not", () => {
  const bars = densityBars(Float64Array.from([0, 0.011, 0.012, 0.5]));
  expect(bars.map(({ count }) => count)).toEqual([2, 1]);
  expect(bars[0]?.from).toBe(-2);
});

test("a dictionary that never fires has no chart, not one without numbers", () => {
  const bars = densityBars(Float64Array.from([0, 0]));
  expect(Bars({ title: "", x: { label: "" }, y: { label: "" }, bars, describe: () => "" })).toBeNull();
});

test("the curves of a long training are made at once", () => {
  const steps = Array.from({ length: 100_000 }, (_, step) => step);
  const start = performance.now();
  const found = curves(steps.map((step) => ({ phase: "train", metric: "fvu", step, tokens: step, value: 1 / (1 + step) })));
  // With a new list for each point it is minutes.
  expect(performance.now() - start).toBeLessThan(5_000);
  expect(found[0]?.[1][0]?.points.at(-1)).toEqual([99_999, 1 / 100_000]);
});

test("who asks for the same shares one request, and it stops when nobody waits", async () => {
  const cache = new Cache(2);
  let started = 0;
  let stopped = 0;
  const load = (signal: AbortSignal): Promise<number> => {
    started += 1;
    signal.addEventListener("abort", () => (stopped += 1));
    return new Promise((resolve) => setTimeout(() => resolve(started), 20));
  };
  const [one, other] = [new AbortController(), new AbortController()];
  const both = [cache.get("a", one.signal, load), cache.get("a", other.signal, load)];
  one.abort();
  await expect(both[0]).rejects.toThrow("no longer wanted");
  await expect(both[1]).resolves.toBe(1);
  expect([started, stopped]).toEqual([1, 0]);

  const alone = new AbortController();
  const waiting = cache.get("b", alone.signal, load);
  alone.abort();
  await expect(waiting).rejects.toThrow("no longer wanted");
  expect([started, stopped]).toEqual([2, 1]);
  await expect(cache.get("b", new AbortController().signal, load)).resolves.toBe(3);
});

test("what failed is asked for again", async () => {
  const cache = new Cache(2);
  const { signal } = new AbortController();
  await expect(cache.get("a", signal, () => Promise.reject(new Error("down")))).rejects.toThrow("down");
  await expect(cache.get("a", signal, () => Promise.resolve("up"))).resolves.toBe("up");
});
