import type { JSX } from "preact";
import { formatRange, parseRange, type Query, type Range } from "../data/query";
import { STATISTICS, type Statistic } from "../data/table";
import { change, replace, type Route } from "../state/route";
import { LABELS } from "./labels";

interface BoundProps {
  route: Route;
  name: Statistic;
  side: 0 | 1;
}

function Bound({ route, name, side }: BoundProps): JSX.Element {
  const range = parseRange(route.params[name]);
  const set = (event: Event): void => {
    const text = (event.currentTarget as HTMLInputElement).value.trim();
    const value = text === "" || Number.isNaN(Number(text)) ? null : Number(text);
    const next: Range = side ? [range[0], value] : [value, range[1]];
    replace(change(route, { [name]: formatRange(next) }));
  };
  return (
    <input
      inputMode="decimal"
      size={7}
      aria-label={`${LABELS[name].title}, ${side ? "at most" : "at least"}`}
      placeholder={side ? "max" : "min"}
      value={range[side] ?? ""}
      onChange={set}
    />
  );
}

/** Bounds of every statistic; those in force stay in sight. */
export function Filters({ route, query }: { route: Route; query: Query }): JSX.Element {
  return (
    <>
      <details class="filters">
        <summary>Filter</summary>
        <div class="panel">
          {STATISTICS.map((name) => (
            <div title={LABELS[name].title}>
              <span>{LABELS[name].short}</span>
              <Bound route={route} name={name} side={0} />
              <Bound route={route} name={name} side={1} />
            </div>
          ))}
        </div>
      </details>
      {query.ranges.map(([name, [low, high]]) => (
        <a class="chip" href={change(route, { [name]: null })} title="remove">
          {low !== null && `${low} ≤ `}
          {LABELS[name].short}
          {high !== null && ` ≤ ${high}`} ✕
        </a>
      ))}
    </>
  );
}
