import type { JSX } from "preact";
import { useMemo } from "preact/hooks";
import type { About } from "../data/source";
import type { AtomTable } from "../data/table";
import { Bars, Lines, type Bar, type Curve } from "../parts/chart";
import { Load } from "../parts/load";
import { figure, percent } from "../parts/number";
import { Sql } from "../parts/sql";
import type { MetricsRow } from "../schemas";
import { link } from "../state/route";
import { useResource } from "../state/resource";
import type { Place } from "./atom";
import { dictionaryQuestions } from "./questions";

const PER_DECADE = 5;
const POINTS = 300;

const NAMES: Record<string, string> = {
  fvu: "fraction of variance unexplained",
  fvu_input: "FVU of the raw activations",
  fvu_pca: "FVU of PCA of the same size",
  fvu_untrained: "FVU of an untrained autoencoder",
  normalized_mse: "normalised MSE",
  l0: "latents per token (L0)",
  dead: "share of dead latents",
  dead_fraction: "share of dead latents",
  loss: "loss",
  loss_clean: "loss of the model, nats per token",
  loss_reconstructed: "  with reconstructed activations",
  loss_zero_ablated: "  with zeroed activations",
  loss_recovered: "share of the gap recovered",
  grad_norm: "norm of the gradient",
};

function nameOf(metric: string): string {
  return NAMES[metric] ?? metric.replaceAll("_", " ");
}

/** Atoms by the logarithm of their density. */
export function densityBars(densities: Float64Array): Bar[] {
  const counts = new Map<number, number>();
  for (const density of densities) {
    if (!(density > 0)) continue;
    const bin = Math.floor(Math.log10(density) * PER_DECADE);
    counts.set(bin, (counts.get(bin) ?? 0) + 1);
  }
  const bins = [...counts].sort(([one], [other]) => one - other);
  return bins.map(([bin, count]) => ({ from: bin / PER_DECADE, to: (bin + 1) / PER_DECADE, count }));
}

const ORDER = Object.keys(NAMES);

/** The place of a metric among those that have a name; others come after them. */
function rank(metric: string): number {
  const found = ORDER.indexOf(metric);
  return found < 0 ? ORDER.length : found;
}

/** The last value of each metric of a phase. */
function latest(metrics: MetricsRow[], phase: string): [string, number][] {
  const found = new Map<string, MetricsRow>();
  for (const row of metrics)
    if (row.phase === phase && row.step >= (found.get(row.metric)?.step ?? -1)) found.set(row.metric, row);
  return [...found].map(([metric, row]): [string, number] => [metric, row.value]).sort(([one], [other]) => rank(one) - rank(other));
}

function thinned<T>(points: T[]): T[] {
  const step = Math.ceil(points.length / POINTS);
  return points.filter((_, i) => i % step === 0 || i === points.length - 1);
}

/** Curves by metric, one for each phase that has several values of it. */
export function curves(metrics: MetricsRow[]): [string, Curve[]][] {
  const found = new Map<string, Map<string, [number, number][]>>();
  for (const { phase, metric, tokens, value } of metrics) {
    if (!Number.isFinite(value)) continue;
    const phases = found.get(metric) ?? new Map<string, [number, number][]>();
    const points = phases.get(phase) ?? [];
    points.push([tokens, value]);
    found.set(metric, phases.set(phase, points));
  }
  return [...found]
    .map(([metric, phases]): [string, Curve[]] => [
      metric,
      [...phases].filter(([, points]) => points.length > 1).map(([name, points]) => ({ name, points: thinned(points) })),
    ])
    .filter(([, lines]) => lines.length)
    .sort(([one], [other]) => rank(one) - rank(other));
}

function Origin({ about }: { about: About }): JSX.Element {
  const facts: [string, string][] = [
    ["model", about.model],
    ["hook", about.hook],
    ["latents", figure(about.n_latents)],
    ["k", figure(about.k)],
    ["trained on", `${figure(about.trained_tokens)} tokens`],
    ["encoded", `${figure(about.n_tokens)} tokens of ${about.corpora.join(", ")}`],
    ["bin width", figure(about.bin_width)],
    ["checkpoint", about.checkpoint],
    ["lake version", String(about.lake_version)],
    ["versions", Object.entries(about.versions).map((pair) => pair.join(" ")).join(", ")],
  ];
  return (
    <section>
      <h3>Made from</h3>
      <dl class="statistics wide">
        {facts.map(([name, value]) => (
          <div>
            <dt>{name}</dt>
            <dd>
              <bdi>{value}</bdi>
            </dd>
          </div>
        ))}
      </dl>
    </section>
  );
}

function Densities({ table, name }: { table: AtomTable; name: string }): JSX.Element {
  const densities = table.numbers.density.subarray(0, table.length);
  const active = table.numbers.n_active.subarray(0, table.length);
  const dead = active.filter((count) => count === 0).length;
  const rare = active.filter((count) => count > 0 && count < 100).length;
  const describe = (bar: Bar): string =>
    `${figure(bar.count)} atoms fire on ${percent(10 ** bar.from)} to ${percent(10 ** bar.to)} of tokens`;
  return (
    <section>
      <h3>How often atoms fire</h3>
      <Bars
        title=""
        x={{ label: "density, log scale", log: true }}
        y={{ label: "atoms" }}
        bars={densityBars(densities)}
        describe={describe}
      />
      <p class="quiet">
        <a href={link("atoms", name, null, { n_active: "..0" })}>{figure(dead)} dead</a> ({percent(dead / Math.max(1, table.length))})
        {" and "}
        <a href={link("atoms", name, null, { n_active: "1..99", sort: "-n_active" })}>{figure(rare)} rare</a> (fewer than 100
        tokens) of {figure(table.total)} atoms
        {table.length < table.total && `, ${figure(table.length)} read so far`}.
      </p>
    </section>
  );
}

function Quality({ metrics }: { metrics: MetricsRow[] }): JSX.Element | null {
  const figures = latest(metrics, "evaluate");
  if (!figures.length) return null;
  return (
    <section>
      <h3>Quality on held-out text</h3>
      <dl class="statistics wide">
        {figures.map(([metric, value]) => (
          <div>
            <dt>{nameOf(metric)}</dt>
            <dd class="number">{figure(value, 4)}</dd>
          </div>
        ))}
      </dl>
    </section>
  );
}

function Training({ metrics }: { metrics: MetricsRow[] }): JSX.Element | null {
  const found = useMemo(() => curves(metrics), [metrics]);
  if (!found.length) return null;
  const phases = [...new Set(found.flatMap(([, lines]) => lines.map(({ name }) => name)))];
  return (
    <section>
      <h3>Training</h3>
      <p class="key quiet">
        {phases.map((phase, i) => (
          <span class={`c${i % 4}`}>
            <i /> {phase}
          </span>
        ))}
      </p>
      <div class="curves">
        {found.map(([metric, lines]) => (
          <Lines
            title={nameOf(metric)}
            x="tokens"
            curves={phases.map((phase) => lines.find(({ name }) => name === phase) ?? { name: phase, points: [] })}
          />
        ))}
      </div>
    </section>
  );
}

/** What an autoencoder was made from, how often its atoms fire, how good it is and how it was trained. */
export function DictionaryPage({ source, entry }: Place): JSX.Element {
  const { name, path } = entry;
  const about = useResource(`about ${path}`, (signal) => source.about(path, signal));
  const table = useResource<AtomTable>(`atoms ${path}`, (signal, progress) => source.atoms(path, signal, progress));
  const metrics = useResource(`metrics ${path}`, (signal) => source.metrics(path, signal));
  return (
    <main>
      <header class="title">
        <h1>
          <span class="quiet">{name}</span> Dictionary
        </h1>
      </header>
      <div class="overview">
        <Load of={about} what="what it was made from">
          {(value) => value && <Origin about={value} />}
        </Load>
        <Load of={table} what="the atoms">
          {(value) => <Densities table={value} name={name} />}
        </Load>
        <Load of={metrics} what="the metrics">
          {(value) => <Quality metrics={value} />}
        </Load>
      </div>
      {metrics.value && <Training metrics={metrics.value} />}
      <Sql questions={dictionaryQuestions(name)} />
    </main>
  );
}
