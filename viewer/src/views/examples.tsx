import type { JSX } from "preact";
import { useCallback, useMemo } from "preact/hooks";
import type { Effect, Example, Source, VotesAt } from "../data/source";
import { Load } from "../parts/load";
import { figure, fixed } from "../parts/number";
import { Sequence, type Colour } from "../parts/sequence";
import { change, type Route } from "../state/route";
import { useResource } from "../state/resource";
import { Choice } from "../parts/choice";

interface Group {
  title: string;
  examples: Example[];
}

const SHOWS = ["top", "random", "deciles", "all"] as const;

/** Ten groups of as many examples each, the strongest first. */
export function deciles(examples: Example[]): Group[] {
  const falling = [...examples].sort((one, other) => other.act - one.act);
  const groups = Array.from({ length: 10 }, (_, i) => {
    const part = falling.slice(Math.round((i * falling.length) / 10), Math.round(((i + 1) * falling.length) / 10));
    const range = part.length ? `${figure(part.at(-1)?.act)} to ${figure(part[0]?.act)}` : "";
    return { title: `${100 - i * 10}% to ${90 - i * 10}%: ${range}`, examples: part };
  });
  return groups.filter((group) => group.examples.length);
}

function grouped(examples: Example[], show: string): Group[] {
  const of = (kind: string): Example[] => examples.filter((example) => example.kind === kind);
  if (show === "random") return [{ title: "", examples: of("random") }];
  if (show === "deciles") return deciles(of("random"));
  if (show !== "all") return [{ title: "", examples: of("top") }];
  return [
    { title: "Top", examples: of("top") },
    { title: "Random", examples: of("random") },
  ];
}

/** The value at which colour is full: most of the effects lie below it. */
export function fullColour(effects: Map<string, Effect>, colour: "loss" | "kl"): number {
  const sizes = [...effects.values()].flatMap((effect) => effect[colour]).flatMap((value) => (value === null ? [] : [Math.abs(value)]));
  sizes.sort((one, other) => one - other);
  return sizes[Math.floor(sizes.length * 0.98)] ?? 0;
}

function Legend({ colour, most }: { colour: Colour; most: number }): JSX.Element {
  const prefixes = colour === "act" ? ["a"] : colour === "kl" ? ["k"] : ["n", "p"];
  const steps = prefixes.flatMap((prefix) => {
    const rising = [2, 4, 6, 8, 10].map((step) => `${prefix}${step}`);
    return prefix === "n" ? rising.reverse() : rising;
  });
  const low = colour === "loss" ? `${figure(-most)} nats, it helped` : "0";
  const high = colour === "act" ? figure(most) : `${figure(most)} nats`;
  return (
    <span class="legend">
      <span>{low}</span>
      {steps.map((step) => (
        <i class={`t ${step}`} />
      ))}
      <span>{high}</span>
    </span>
  );
}

interface ExamplesProps {
  source: Source;
  route: Route;
  path: string;
  atom: number;
  maxAct: number;
  /** Contexts that are examples elsewhere on the page as well. */
  shared?: Set<number> | undefined;
  onLoad?: (examples: Example[]) => void;
}

const NONE = new Map<string, Effect>();

function colourOf(route: Route, hasEffects: boolean): Colour {
  const wanted = route.params["color"];
  return hasEffects && (wanted === "loss" || wanted === "kl") ? wanted : "act";
}

/** The contexts in which an atom fires, as heat maps of their tokens. */
export function Examples(props: ExamplesProps): JSX.Element {
  const { source, path, atom } = props;
  const examples = useResource(`examples ${path} ${atom}`, async (signal) => {
    const found = await source.examples(path, atom, signal);
    props.onLoad?.(found);
    return found;
  });
  return (
    <section class="examples">
      <Load of={examples} what="the examples">
        {(found) => (found.length ? <Shown {...props} examples={found} /> : <p class="quiet">It never fires: there are no examples.</p>)}
      </Load>
    </section>
  );
}

function Shown({ source, route, path, atom, maxAct, shared, examples }: ExamplesProps & { examples: Example[] }): JSX.Element {
  const effects = useResource(`effects ${path} ${atom}`, (signal) => source.effects(path, atom, signal));
  const known = effects.value ?? NONE;
  const colour = colourOf(route, known.size > 0);
  const whole = route.params["context"] === "all";
  const most = useMemo(() => (colour === "act" ? maxAct : fullColour(known, colour)), [colour, known, maxAct]);
  const votes = useCallback(
    async (key: string): Promise<VotesAt | undefined> => (await source.votes(path, atom, new AbortController().signal)).get(key),
    [source, path, atom],
  );
  const show = SHOWS.find((one) => one === route.params["show"]) ?? "top";
  return (
    <>
      <div class="controls">
        <h3>Examples</h3>
        <Choice
          label="Which examples"
          options={SHOWS.map((one) => ({ name: one, href: change(route, { show: one === "top" ? null : one }), on: one === show }))}
        />
        {known.size > 0 && (
          <Choice
            label="Colour by"
            options={[
              { name: "activation", href: change(route, { color: null }), on: colour === "act" },
              { name: "effect on loss", href: change(route, { color: "loss" }), on: colour === "loss" },
              { name: "KL", href: change(route, { color: "kl" }), on: colour === "kl" },
            ]}
          />
        )}
        <Choice
          label="How much of the context"
          options={[
            { name: "peak", href: change(route, { context: null }), on: !whole },
            { name: "whole context", href: change(route, { context: "all" }), on: whole },
          ]}
        />
        <Legend colour={colour} most={most} />
      </div>
      {effects.error !== undefined && (
        <Load of={effects} what="the effects">
          {() => null}
        </Load>
      )}
      {grouped(examples, show).map(({ title, examples: group }) => (
        <>
          {title && <h4 class="group">{title}</h4>}
          <ol class="example-list">
            {group.map((example) => (
              <li key={example.key} class={example.contextId !== null && shared?.has(example.contextId) ? "shared" : ""}>
                <span class="number act">{fixed(example.act, 2)}</span>
                <Sequence example={example} colour={colour} most={most} whole={whole} effect={known.get(example.key)} votes={votes} />
                <span class="where" title={example.source}>
                  <bdi>{example.document}</bdi>
                </span>
              </li>
            ))}
          </ol>
        </>
      ))}
    </>
  );
}
