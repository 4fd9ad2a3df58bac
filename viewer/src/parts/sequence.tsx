import type { JSX } from "preact";
import { memo } from "./memo";
import type { Effect, Example, Votes, VotesAt, Vote } from "../data/source";
import { marked, short } from "./marks";
import { figure, fixed, percent } from "./number";
import { leaveTip, showTip } from "./tooltip";

export type Colour = "act" | "loss" | "kl";

const LEVELS = 10;
const AROUND = 12;
const AFTER_EFFECT = 20;

/** The colour class of a value: 1 to 10 of one hue, for a loss also negative. */
export function level(colour: Colour, value: number | null | undefined, most: number): string {
  if (!value || !(most > 0)) return "";
  const step = Math.min(LEVELS, Math.ceil((Math.abs(value) / most) * LEVELS));
  if (colour === "act") return ` a${step}`;
  return colour === "kl" ? ` k${step}` : ` ${value < 0 ? "n" : "p"}${step}`;
}

interface VoteListProps {
  title: string;
  votes: Vote[];
  show: (value: number) => string;
}

const byLogit = (value: number): string => fixed(value, 3);
const byProbability = (value: number): string => percent(value);

function VoteList({ title, votes, show }: VoteListProps): JSX.Element {
  return (
    <div>
      <h4>{title}</h4>
      <ol class="votes">
        {votes.map(({ token, value }) => (
          <li>
            <bdi class="token">{short(token)}</bdi>
            <span class="number">{show(value)}</span>
          </li>
        ))}
      </ol>
    </div>
  );
}

function VoteTable({ votes }: { votes: Votes }): JSX.Element {
  return (
    <div class="vote-table">
      <VoteList title="more likely with it, by logit" votes={votes.up_by_logits} show={byLogit} />
      <VoteList title="less likely, by logit" votes={votes.down_by_logits} show={byLogit} />
      <VoteList title="more likely, by probability" votes={votes.up_by_probs} show={byProbability} />
      <VoteList title="less likely, by probability" votes={votes.down_by_probs} show={byProbability} />
    </div>
  );
}

interface TokenTipProps {
  example: Example;
  position: number;
  effect: Effect | undefined;
  votes: Votes | null;
}

function TokenTip({ example, position, effect, votes }: TokenTipProps): JSX.Element {
  const token = example.tokens[position] ?? "";
  const loss = effect?.loss[position];
  const kl = effect?.kl[position];
  return (
    <>
      <bdi class="token whole">{marked(token)}</bdi>
      <dl class="facts">
        <dt>activation</dt>
        <dd>{figure(example.acts[position])}</dd>
        <dt>position</dt>
        <dd>
          {position} of {example.tokens.length}
        </dd>
        {loss !== null && loss !== undefined && (
          <>
            <dt>change of loss</dt>
            <dd>{figure(loss)} nats</dd>
          </>
        )}
        {kl !== null && kl !== undefined && (
          <>
            <dt>KL divergence</dt>
            <dd>{figure(kl)} nats</dd>
          </>
        )}
      </dl>
      {votes && <VoteTable votes={votes} />}
    </>
  );
}

interface SequenceProps {
  example: Example;
  colour: Colour;
  most: number;
  whole: boolean;
  effect: Effect | undefined;
  votes: (key: string) => Promise<VotesAt | undefined>;
}

function span({ example, whole, colour }: SequenceProps): [number, number] {
  if (whole) return [0, example.tokens.length];
  const after = colour === "act" ? AROUND : AFTER_EFFECT;
  return [Math.max(0, example.idx - AROUND), Math.min(example.tokens.length, example.idx + after + 1)];
}

function value({ example, colour, effect }: SequenceProps, position: number): number | null | undefined {
  return colour === "act" ? example.acts[position] : effect?.[colour][position];
}

function isClipped(token: string): boolean {
  return token.length > 200;
}

/** An example's tokens, coloured; one element for each. */
export const Sequence = memo(function Sequence(props: SequenceProps): JSX.Element {
  const { example, effect, colour, most } = props;
  const [start, end] = span(props);
  const shown = example.tokens.slice(start, end);
  const hover = (event: Event): void => {
    const target = event.target as HTMLElement;
    const position = Number(target.dataset["p"] ?? NaN);
    if (Number.isNaN(position)) return leaveTip(event);
    const show = (votes: Votes | null): void =>
      showTip(target, <TokenTip example={example} position={position} effect={effect} votes={votes} />);
    show(null);
    if (effect?.loss[position] == null) return;
    void props.votes(example.key).then((at) => at && target.matches(":hover") && show(at(position)), () => undefined);
  };
  return (
    <p class={`sequence by-${colour}${colour !== "act" && !effect ? " unknown" : ""}`} onPointerOver={hover} onPointerLeave={leaveTip}>
      {start > 0 && <span class="more">…</span>}
      {shown.map((token, i) => {
        const position = start + i;
        const peak = position === example.idx ? " peak" : "";
        const long = isClipped(token) ? " long" : "";
        return (
          <bdi class={`t${level(colour, value(props, position), most)}${peak}${long}`} data-p={position}>
            {short(token)}
          </bdi>
        );
      })}
      {end < example.tokens.length && <span class="more">…</span>}
    </p>
  );
});
