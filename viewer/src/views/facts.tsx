import type { JSX } from "preact";
import { holds, type About } from "../data/source";
import { Bars, type Bar } from "../parts/chart";
import { marked, short } from "../parts/marks";
import { figure, fixed, oneIn, percent } from "../parts/number";
import { tip } from "../parts/tooltip";
import type { PagesRow } from "../schemas";
import { link } from "../state/route";
import { LABELS } from "./labels";

const REFERENCE_WIDTH = 0.2;

export function Statistics({ page }: { page: PagesRow }): JSX.Element {
  const meanActive = page.density > 0 ? page.mean_act / page.density : null;
  const facts: [string, string, string][] = [
    ["density", page.density > 0 ? percent(page.density) : "0", oneIn(page.density)],
    ["fires on", figure(page.n_active), "tokens"],
    ["max activation", figure(page.max_act), ""],
    ["mean where active", figure(meanActive), ""],
    ["mean", figure(page.mean_act), "over all tokens"],
    ["mean of squares", figure(page.mean_act_squared), "over all tokens"],
    ["skew", figure(page.skew), "E[a³] / E[a²]^1.5"],
    ["kurtosis", figure(page.kurtosis), "E[a⁴] / E[a²]²"],
  ];
  if (page.effect_loss !== null) facts.push(["effect on loss", figure(page.effect_loss), "nats; below 0 it helps"]);
  if (page.effect_kl !== null) facts.push(["effect, KL", figure(page.effect_kl), "nats"]);
  return (
    <dl class="statistics">
      {facts.map(([name, value, note]) => (
        <div>
          <dt>{name}</dt>
          <dd class="number">{value}</dd>
          <dd class="quiet">{note}</dd>
        </div>
      ))}
    </dl>
  );
}

export function Histograms({ page, about }: { page: PagesRow; about: About | null }): JSX.Element | null {
  const width = about?.bin_width ?? REFERENCE_WIDTH;
  const bars: Bar[] = page.hist_bin.map((bin, i) => ({
    from: (bin - 1) * width,
    to: bin * width,
    count: page.hist_n[i] ?? 0,
  }));
  if (!bars.length) return null;
  const describe = (bar: Bar): string => `${figure(bar.count)} tokens with ${figure(bar.from)} < activation ≤ ${figure(bar.to)}`;
  const x = { label: "activation" };
  return (
    <div class="charts">
      <Bars title="Activations" x={x} y={{ label: "tokens" }} bars={bars} describe={describe} />
      <Bars title="Log density" x={x} y={{ label: "tokens, log scale", log: true }} bars={bars} describe={describe} />
    </div>
  );
}

function TokenList({ title, tokens, values }: { title: string; tokens: string[]; values: number[] }): JSX.Element {
  return (
    <div>
      <h4>{title}</h4>
      <ol class="votes">
        {tokens.map((token, i) => (
          <li>
            <bdi class="token" {...tip(() => <bdi class="token whole">{marked(token)}</bdi>)}>
              {short(token)}
            </bdi>
            <span class="number">{fixed(values[i], 3)}</span>
          </li>
        ))}
      </ol>
    </div>
  );
}

export function Logits({ page }: { page: PagesRow }): JSX.Element | null {
  if (!page.up_tokens.length) return null;
  return (
    <section class="logits">
      <h3>Direct logits</h3>
      <div class="pair">
        <TokenList title="raises" tokens={page.up_tokens} values={page.up_logits} />
        <TokenList title="lowers" tokens={page.down_tokens} values={page.down_logits} />
      </div>
    </section>
  );
}

interface AtomsOfProps {
  title: string;
  unit: string;
  name: string;
  about: About | null;
  atoms: number[];
  values: number[];
}

function AtomsOf({ title, unit, name, about, atoms, values }: AtomsOfProps): JSX.Element | null {
  if (!atoms.length) return null;
  return (
    <div>
      <h4>
        {title} <span class="quiet">{unit}</span>
      </h4>
      <ol class="votes">
        {atoms.map((atom, i) => (
          <li>
            {!about || holds(about, atom) ? (
              <a href={link("atom", name, atom)}>{atom}</a>
            ) : (
              <span title="not among the atoms here">{atom}</span>
            )}
            <span class="number">{fixed(values[i], 3)}</span>
          </li>
        ))}
      </ol>
    </div>
  );
}

export function Neighbours({ page, name, about }: { page: PagesRow; name: string; about: About | null }): JSX.Element | null {
  const of = { name, about };
  if (!page.near.length && !page.coactive.length) return null;
  return (
    <section>
      <h3>Related atoms</h3>
      <div class="pair">
        <AtomsOf title="nearest" unit="cosine" {...of} atoms={page.near} values={page.near_cosine} />
        <AtomsOf title="fire together" unit="correlation" {...of} atoms={page.coactive} values={page.coactive_correlation} />
      </div>
    </section>
  );
}

export function Sources({ page }: { page: PagesRow }): JSX.Element | null {
  if (page.source.length < 2) return null;
  return (
    <section>
      <h3>Sources</h3>
      <ol class="votes">
        {page.source.map((source, i) => (
          <li>
            <bdi>{short(source)}</bdi>
            <meter min={0} max={1} value={page.source_share[i] ?? 0} />
            <span class="number">{percent(page.source_share[i] ?? 0)}</span>
          </li>
        ))}
      </ol>
    </section>
  );
}

export function Explanation({ page }: { page: PagesRow }): JSX.Element | null {
  if (!page.explanation && !page.patterns.length) return null;
  return (
    <section class="explanation">
      {page.explanation && (
        <p>
          <bdi>{page.explanation}</bdi>
          {page.explanation_score !== null && (
            <span class="quiet" title={LABELS.explanation_score.title}>
              {" "}
              score {figure(page.explanation_score, 2)}
            </span>
          )}
        </p>
      )}
      {page.patterns.length > 0 && (
        <p class="patterns">
          {page.patterns.map((pattern) => (
            <bdi class="token">{short(pattern)}</bdi>
          ))}
        </p>
      )}
    </section>
  );
}
