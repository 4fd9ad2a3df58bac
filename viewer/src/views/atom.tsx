import type { JSX } from "preact";
import { useEffect } from "preact/hooks";
import type { About, Source } from "../data/source";
import { Load } from "../parts/load";
import { Sql } from "../parts/sql";
import type { Entry } from "../schemas";
import { link, type Route } from "../state/route";
import { useResource } from "../state/resource";
import { Examples } from "./examples";
import { Explanation, Histograms, Logits, Neighbours, Sources, Statistics } from "./facts";
import { atomQuestions } from "./questions";

export interface Place {
  source: Source;
  route: Route;
  entry: Entry;
}

/** The atom `by` further on, around the ends of what is there. */
export function neighbour(about: About | null, atom: number, by: number): number {
  if (!about) return Math.max(0, atom + by);
  const { atoms: [first, last], picked = [] } = about;
  if (picked.length && by > 0) return picked.find((one) => one > atom) ?? first;
  if (picked.length) return picked.filter((one) => one < atom).at(-1) ?? last;
  if (atom + by > last) return first;
  return atom + by < first ? last : atom + by;
}

/** Asks for the next atom while this one is looked at. */
function usePrefetch(source: Source, path: string, atom: number, ready: boolean): void {
  useEffect(() => {
    if (!ready) return;
    const control = new AbortController();
    const ignore = (): void => undefined;
    source.page(path, atom, control.signal).catch(ignore);
    source.examples(path, atom, control.signal).catch(ignore);
    source.effects(path, atom, control.signal).catch(ignore);
    return () => control.abort();
  }, [source, path, atom, ready]);
}

/** All that is known of one atom. */
export function AtomPage({ source, route, entry }: Place): JSX.Element {
  const { name, path } = entry;
  const atom = route.atom ?? 0;
  const about = useResource(`about ${path}`, (signal) => source.about(path, signal));
  const page = useResource(`page ${path} ${atom}`, (signal) => source.page(path, atom, signal));
  const range = about.value ?? null;
  usePrefetch(source, path, neighbour(range, atom, 1), page.value !== undefined);
  return (
    <main class="atom">
      <header class="title">
        <h1>
          <span class="quiet">{name}</span> Atom {atom}
        </h1>
        <nav>
          <a href={link("atom", name, neighbour(range, atom, -1), route.params)} title="previous atom (k)">
            ← {neighbour(range, atom, -1)}
          </a>
          <a href={link("atom", name, neighbour(range, atom, 1), route.params)} title="next atom (j)">
            {neighbour(range, atom, 1)} →
          </a>
          <a href={link("compare", null, null, { on: `${name}:${atom}` })}>Compare</a>
        </nav>
      </header>
      <Load of={page} what={`atom ${atom}`}>
        {(row) => (
          <>
            <Explanation page={row} />
            <div class="overview">
              <Statistics page={row} />
              <Histograms page={row} about={range} />
              <Logits page={row} />
              <Neighbours page={row} name={name} about={range} />
              <Sources page={row} />
            </div>
            <Examples source={source} route={route} path={path} atom={atom} maxAct={row.max_act} />
            {source.complete && <Sql questions={atomQuestions(name, atom)} />}
          </>
        )}
      </Load>
    </main>
  );
}
