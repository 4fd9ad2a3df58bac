import type { JSX } from "preact";
import { figure } from "./number";
import { tip } from "./tooltip";

const WIDTH = 300;
const HEIGHT = 165;
const LEFT = 46;
const RIGHT = 10;
const TOP = 10;
const BOTTOM = 36;

/** Round numbers from `low` to `high`, about `count` of them. */
export function ticks(low: number, high: number, count: number): number[] {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough) ?? rough;
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

interface Axis {
  label: string;
  low: number;
  high: number;
  /** Values are powers of ten. */
  log?: boolean;
}

function tickText(axis: Axis, value: number): string {
  return axis.log ? figure(10 ** value, 1) : figure(value);
}

function axisTicks(axis: Axis, count: number): number[] {
  const found = ticks(axis.low, axis.high, count);
  return axis.log ? found.filter(Number.isInteger) : found;
}

export interface Scale {
  x: (value: number) => number;
  y: (value: number) => number;
}

interface FrameProps {
  title: string;
  x: Axis;
  y: Axis;
  children: (scale: Scale) => JSX.Element | JSX.Element[];
}

function place(axis: Axis, from: number, to: number): (value: number) => number {
  const span = axis.high - axis.low || 1;
  return (value) => Number((from + ((value - axis.low) / span) * (to - from)).toFixed(2));
}

/** Axes with labels and round ticks around what `children` draw. */
export function Frame({ title, x, y, children }: FrameProps): JSX.Element {
  const scale = { x: place(x, LEFT, WIDTH - RIGHT), y: place(y, HEIGHT - BOTTOM, TOP) };
  return (
    <figure class="chart">
      <figcaption>{title}</figcaption>
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label={`${title}: ${y.label} by ${x.label}`}>
        {axisTicks(y, 4).map((value) => (
          <g>
            <line class="grid" x1={LEFT} x2={WIDTH - RIGHT} y1={scale.y(value)} y2={scale.y(value)} />
            <text class="tick" x={LEFT - 6} y={scale.y(value) + 3} text-anchor="end">
              {tickText(y, value)}
            </text>
          </g>
        ))}
        {axisTicks(x, x.log ? 6 : 4).map((value) => (
          <text class="tick" x={scale.x(value)} y={HEIGHT - BOTTOM + 14} text-anchor="middle">
            {tickText(x, value)}
          </text>
        ))}
        {children(scale)}
        <line class="axis" x1={LEFT} x2={WIDTH - RIGHT} y1={HEIGHT - BOTTOM} y2={HEIGHT - BOTTOM} />
        <text class="axis-label" x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 4} text-anchor="middle">
          {x.label}
        </text>
        <text class="axis-label" x={LEFT} y={TOP - 1} text-anchor="start">
          {y.label}
        </text>
      </svg>
    </figure>
  );
}

export interface Bar {
  from: number;
  to: number;
  count: number;
}

interface BarsProps {
  title: string;
  x: { label: string; log?: boolean };
  y: { label: string; log?: boolean };
  bars: Bar[];
  describe: (bar: Bar) => string;
}

/** Counts by range of a value. */
export function Bars({ title, x, y, bars, describe }: BarsProps): JSX.Element | null {
  if (!bars.length) return null;
  const most = Math.max(1, ...bars.map((bar) => bar.count));
  const height = (count: number): number => (y.log ? Math.log10(Math.max(count, 0.5)) : count);
  const base = y.log ? height(0.5) : 0;
  const low = Math.min(...bars.map((bar) => bar.from), x.log ? Infinity : 0);
  const high = Math.max(...bars.map((bar) => bar.to));
  return (
    <Frame title={title} x={{ ...x, low, high }} y={{ ...y, low: base, high: height(most) * 1.05 }}>
      {(scale) =>
        bars
          .filter((bar) => bar.count > 0)
          .map((bar) => {
            const top = scale.y(height(bar.count));
            const left = scale.x(bar.from);
            return (
              <rect
                class="bar"
                x={left}
                y={top}
                width={Math.max(0.5, scale.x(bar.to) - left - 0.75)}
                height={Math.max(0.5, scale.y(base) - top)}
                {...tip(() => describe(bar))}
              />
            );
          })
      }
    </Frame>
  );
}

export interface Curve {
  name: string;
  points: [number, number][];
}

/** One line for each curve over a common x. */
export function Lines({ title, x, curves }: { title: string; x: string; curves: Curve[] }): JSX.Element {
  const all = curves.flatMap((curve) => curve.points);
  const ys = all.map(([, value]) => value);
  const [low, high] = [Math.min(...ys), Math.max(...ys)];
  const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  const xs = all.map(([value]) => value);
  const horizontal = { label: x, low: Math.min(...xs), high: Math.max(...xs) };
  return (
    <Frame title={title} x={horizontal} y={{ label: "", low: low - room, high: high + room }}>
      {(scale) =>
        curves.map((curve, i) => (
          <g class={`curve c${i % 4}`} {...tip(() => `${curve.name}, last ${figure(curve.points.at(-1)?.[1], 4)}`)}>
            <polyline points={curve.points.map(([at, value]) => `${scale.x(at)},${scale.y(value)}`).join(" ")} />
            {curve.points.length < 12 &&
              curve.points.map(([at, value]) => <circle cx={scale.x(at)} cy={scale.y(value)} r="2.5" />)}
          </g>
        ))
      }
    </Frame>
  );
}
