import type { JSX } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { parseQuery, select, type Query } from "../data/query";
import { STATISTICS, type AtomTable, type Statistic } from "../data/table";
import { Load } from "../parts/load";
import { short } from "../parts/marks";
import { figure } from "../parts/number";
import { Sql } from "../parts/sql";
import { Virtual } from "../parts/virtual";
import { change, go, link, replace, type Route } from "../state/route";
import { useKeys } from "../state/keys";
import { useResource } from "../state/resource";
import type { Place } from "./atom";
import { Filters } from "./filters";
import { LABELS } from "./labels";
import { listSql } from "./questions";

const ROW = 30;
const TOKENS = 6;

const TEXTS = ["peaks", "logits", "explanation"] as const;
type Text = (typeof TEXTS)[number];
const TEXT_LABELS: Record<Text, string> = { peaks: "peaks on", logits: "raises", explanation: "explanation" };

/** Statistics that no atom has are left out, and the less used ones unless the list is sorted by them. */
function columnsOf(table: AtomTable, query: Query): Statistic[] {
  const rare = new Set<Statistic>(["mean_act_squared", "n_active"]);
  const wanted = new Set([query.sort, ...query.ranges.map(([name]) => name)]);
  const isKnown = (name: Statistic): boolean => table.numbers[name].subarray(0, table.length).some((value) => !Number.isNaN(value));
  return STATISTICS.filter((name) => wanted.has(name) || (!rare.has(name) && isKnown(name)));
}

/** Columns of text that no atom has are left out as well. */
function textsOf(table: AtomTable): Text[] {
  const known: Record<Text, boolean> = {
    peaks: true,
    logits: table.logitTokens.some((tokens) => tokens.length),
    explanation: table.explanation.some((text) => text !== null),
  };
  return TEXTS.filter((name) => known[name]);
}

function Heading({ name, query, route }: { name: Statistic; query: Query; route: Route }): JSX.Element {
  const on = query.sort === name;
  // A number is first asked for from the top, an atom from the first on.
  const falling = on ? !query.falling : name !== "atom";
  const sort = falling ? `-${name}` : name === "atom" ? null : name;
  return (
    <span
      role="columnheader"
      class={`cell number c-${name}${on ? " sorted" : ""}`}
      aria-sort={on ? (query.falling ? "descending" : "ascending") : "none"}
    >
      <a href={change(route, { sort })} title={LABELS[name].title}>
        {LABELS[name].short}
        {on && <span class="arrow">{query.falling ? "▾" : "▴"}</span>}
      </a>
    </span>
  );
}

function Tokens({ tokens }: { tokens: string[] }): JSX.Element {
  return (
    <>
      {tokens.slice(0, TOKENS).map((token) => (
        <bdi class="token">{short(token)}</bdi>
      ))}
    </>
  );
}

interface RowProps {
  table: AtomTable;
  row: number;
  columns: Statistic[];
  texts: Text[];
  query: Query;
  name: string;
  selected: boolean;
}

function TextCell({ table, row, text }: { table: AtomTable; row: number; text: Text }): JSX.Element {
  if (text === "explanation") return <bdi>{table.explanation[row] ?? ""}</bdi>;
  return <Tokens tokens={(text === "peaks" ? table.peakTokens : table.logitTokens)[row] ?? []} />;
}

function Row({ table, row, columns, texts, query, name, selected }: RowProps): JSX.Element {
  const atom = table.number("atom", row);
  return (
    <div role="row" class={`row${selected ? " selected" : ""}`}>
      {columns.map((column) => (
        <span role="cell" class={`cell number c-${column}${column === query.sort ? " sorted" : ""}`}>
          {column === "atom" ? <a href={link("atom", name, atom)}>{atom}</a> : figure(table.number(column, row))}
        </span>
      ))}
      {texts.map((text) => (
        <span role="cell" class={`cell c-${text}`}>
          <TextCell table={table} row={row} text={text} />
        </span>
      ))}
    </div>
  );
}

/** All atoms of an autoencoder. */
export function ListPage({ source, route, entry }: Place): JSX.Element {
  const { path, name } = entry;
  const table = useResource<AtomTable>(`atoms ${path}`, (signal, progress) => source.atoms(path, signal, progress));
  return (
    <main class="list">
      <Load of={table} what="the list of atoms">
        {(value) => <List table={value} length={value.length} route={route} name={name} />}
      </Load>
    </main>
  );
}

interface ListProps {
  table: AtomTable;
  /** How many rows there are so far: the table is the same object while it grows. */
  length: number;
  route: Route;
  name: string;
}

function Search({ route, text }: { route: Route; text: string }): JSX.Element {
  const input = useRef<HTMLInputElement>(null);
  const timer = useRef<ReturnType<typeof setTimeout>>(undefined);
  const latest = useRef(route);
  latest.current = route;
  useKeys({ "/": () => input.current?.focus() });
  useEffect(() => {
    if (route.params["focus"]) {
      input.current?.focus();
      replace(change(route, { focus: null }));
    }
    return () => clearTimeout(timer.current);
  }, []);
  useEffect(() => {
    if (input.current && document.activeElement !== input.current) input.current.value = text;
  }, [text]);
  const search = (): void => {
    clearTimeout(timer.current);
    timer.current = setTimeout(() => replace(change(latest.current, { q: input.current?.value ?? null })), 120);
  };
  return (
    <input
      ref={input}
      type="search"
      placeholder="Search tokens, logits, explanations"
      aria-label="Search tokens, logit tokens and explanations"
      defaultValue={text}
      onInput={search}
      onKeyDown={(event) => event.key === "Escape" && input.current?.blur()}
    />
  );
}

function List({ table, length, route, name }: ListProps): JSX.Element {
  const asked = JSON.stringify([route.params, length]);
  const query = useMemo(() => parseQuery(route.params), [asked]);
  const rows = useMemo(() => select(table, query), [table, asked]);
  const columns = useMemo(() => columnsOf(table, query), [table, asked]);
  const texts = useMemo(() => textsOf(table), [table, length]);
  const [chosen, choose] = useState<number | null>(null);
  useEffect(() => choose(null), [asked]);
  const move = (by: number): void => {
    // A heading that was clicked would take Enter.
    if (document.activeElement instanceof HTMLElement) document.activeElement.blur();
    choose(Math.max(0, Math.min(rows.length - 1, (chosen ?? -1) + by)));
  };
  const open = (): void => {
    const row = chosen === null ? undefined : rows[chosen];
    if (row !== undefined) go(link("atom", name, table.number("atom", row)));
  };
  useKeys({ j: () => move(1), k: () => move(-1), ...(chosen === null ? {} : { Enter: open }) });
  return (
    <>
      <div class="list-bar">
        <Search route={route} text={query.text} />
        <Filters route={route} query={query} />
        <span class="quiet number" role="status">
          {figure(rows.length)} of {figure(table.total)} atoms
          {length < table.total && `, ${Math.floor((100 * length) / table.total)}% loaded`}
        </span>
      </div>
      <div class="table" role="table" aria-rowcount={rows.length}>
        <div class="row head" role="row">
          {columns.map((column) => (
            <Heading name={column} query={query} route={route} />
          ))}
          {texts.map((text) => (
            <span role="columnheader" class={`cell c-${text}`}>
              {TEXT_LABELS[text]}
            </span>
          ))}
        </div>
        <Virtual
          count={rows.length}
          height={ROW}
          name={`${name} ${JSON.stringify(route.params)}`}
          selected={chosen}
          row={(index) => {
            const row = rows[index] ?? 0;
            return <Row {...{ table, row, columns, texts, query, name }} selected={index === chosen} />;
          }}
        />
        {!rows.length && length === table.total && <p class="quiet none">No atom is like that.</p>}
      </div>
      <Sql questions={[{ title: "This list, as it is sorted and filtered", sql: listSql(name, query) }]} />
    </>
  );
}
