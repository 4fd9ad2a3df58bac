import type { JSX } from "preact";
import { useCallback, useState } from "preact/hooks";
import type { Example, Source } from "../data/source";
import { Load } from "../parts/load";
import type { Entry } from "../schemas";
import { change, decode, link, replace, type Route } from "../state/route";
import { useResource } from "../state/resource";
import { Examples } from "./examples";
import { Explanation, Histograms, Logits, Statistics } from "./facts";

interface Column {
  name: string;
  atom: number;
}

export function parseColumns(text: string): Column[] {
  return text.split(",").flatMap((part) => {
    const found = /^(.*):(\d{1,9})$/s.exec(part);
    return found ? [{ name: decode(found[1] ?? ""), atom: Number(found[2]) }] : [];
  });
}

export function formatColumns(columns: Column[]): string {
  return columns.map(({ name, atom }) => `${encodeURIComponent(name)}:${atom}`).join(",");
}

/** Contexts that are among the examples of more than one column. */
export function sharedContexts(columns: (Example[] | undefined)[]): Set<number> {
  const seen = new Map<number, Set<number>>();
  columns.forEach((examples, column) => {
    for (const { contextId } of examples ?? []) {
      if (contextId === null) continue;
      seen.set(contextId, (seen.get(contextId) ?? new Set()).add(column));
    }
  });
  return new Set([...seen].filter(([, where]) => where.size > 1).map(([context]) => context));
}

interface OneProps {
  source: Source;
  route: Route;
  entries: Entry[];
  column: Column;
  shared: Set<number>;
  onChange: (column: Column | null) => void;
  onLoad: (examples: Example[]) => void;
}

function One({ source, route, entries, column, shared, onChange, onLoad }: OneProps): JSX.Element {
  const { name, atom } = column;
  const path = entries.find((entry) => entry.name === name)?.path ?? name;
  const about = useResource(`about ${path}`, (signal) => source.about(path, signal));
  const page = useResource(`page ${path} ${atom}`, (signal) => source.page(path, atom, signal));
  const toAtom = (event: Event): void => {
    const text = (event.currentTarget as HTMLInputElement).value;
    if (/^\d{1,9}$/.test(text)) onChange({ name, atom: Number(text) });
  };
  return (
    <section class="column">
      <header class="title">
        <div class="pick">
          <select aria-label="autoencoder" onChange={(event) => onChange({ name: event.currentTarget.value, atom })}>
            {entries.map((entry) => (
              <option value={entry.name} selected={entry.name === name}>
                {entry.name}
              </option>
            ))}
          </select>
          <input type="number" min={0} aria-label="atom" value={atom} onChange={toAtom} />
          <a href={link("atom", name, atom)}>open</a>
        </div>
        <button onClick={() => onChange(null)} aria-label="remove this column">
          ✕
        </button>
      </header>
      <Load of={page} what={`atom ${atom}`}>
        {(row) => (
          <>
            <Explanation page={row} />
            <Statistics page={row} />
            <Histograms page={row} about={about.value ?? null} />
            <Logits page={row} />
            <Examples {...{ source, route, path, atom, shared, onLoad }} maxAct={row.max_act} />
          </>
        )}
      </Load>
    </section>
  );
}

/** Atoms side by side, of one autoencoder or of several. */
export function ComparePage({ source, route, entries }: { source: Source; route: Route; entries: Entry[] }): JSX.Element {
  const columns = parseColumns(route.params["on"] ?? "");
  const [loaded, setLoaded] = useState<Record<string, Example[]>>({});
  const keep = useCallback((key: string, examples: Example[]) => setLoaded((before) => ({ ...before, [key]: examples })), []);
  const key = ({ name, atom }: Column): string => `${name}:${atom}`;
  const shared = sharedContexts(columns.map((column) => loaded[key(column)]));
  const set = (next: Column[]): void => replace(change(route, { on: formatColumns(next) }));
  const add = (): void => {
    const last = columns.at(-1);
    const other = entries.find(({ name }) => !columns.some((column) => column.name === name)) ?? entries[0];
    if (other) set([...columns, { name: other.name, atom: last?.atom ?? 0 }]);
  };
  return (
    <main class="wide">
      <header class="title">
        <h1>Side by side</h1>
        <button onClick={add}>Add a column</button>
      </header>
      {!columns.length && <p class="quiet">Add columns to see atoms of the site's autoencoders beside each other.</p>}
      {shared.size > 0 && (
        <p class="quiet">
          {shared.size === 1 ? "One context is an example" : `${shared.size} contexts are examples`} of several atoms here,
          marked at their left.
        </p>
      )}
      <div class="columns">
        {columns.map((column, i) => (
          <One
            key={`${i}`}
            {...{ source, route, entries, column, shared }}
            onChange={(next) => set(columns.flatMap((one, at) => (at === i ? (next ? [next] : []) : [one])))}
            onLoad={(examples) => keep(key(column), examples)}
          />
        ))}
      </div>
    </main>
  );
}
