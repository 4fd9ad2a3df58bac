import type { AtomsRow } from "../schemas";
import type { Columns } from "./parquet";

export const STATISTICS = [
  "atom",
  "n_active",
  "density",
  "mean_act",
  "mean_act_squared",
  "max_act",
  "skew",
  "kurtosis",
  "effect_loss",
  "effect_kl",
  "explanation_score",
] as const;
export type Statistic = (typeof STATISTICS)[number];

/** All atoms of an autoencoder, by column; NaN where a statistic has no value. Rows from `length` on are not here yet. */
export class AtomTable {
  length = 0;
  readonly numbers: Record<Statistic, Float64Array>;
  readonly explanation: (string | null)[] = [];
  readonly peakTokens: string[][] = [];
  readonly logitTokens: string[][] = [];
  private readonly searched: string[] = [];

  constructor(readonly total: number) {
    const column = (name: Statistic): [Statistic, Float64Array] => [name, new Float64Array(total)];
    this.numbers = Object.fromEntries(STATISTICS.map(column)) as Record<Statistic, Float64Array>;
  }

  append(rows: Columns<AtomsRow>): void {
    const count = rows.atom.length;
    for (const name of STATISTICS) {
      const column = this.numbers[name];
      for (let row = 0; row < count; row += 1) column[this.length + row] = rows[name][row] ?? NaN;
    }
    for (let row = 0; row < count; row += 1) {
      this.explanation.push(rows.explanation[row] ?? null);
      this.peakTokens.push(rows.peak_tokens[row] ?? []);
      this.logitTokens.push(rows.logit_tokens[row] ?? []);
    }
    this.length += count;
  }

  number(name: Statistic, row: number): number {
    return this.numbers[name][row] ?? NaN;
  }

  /** What a search looks through, in lower case. */
  text(row: number): string {
    const known = this.searched[row];
    if (known !== undefined) return known;
    const parts = [...(this.peakTokens[row] ?? []), ...(this.logitTokens[row] ?? []), this.explanation[row] ?? ""];
    const text = parts.join("\u0001").toLowerCase();
    this.searched[row] = text;
    return text;
  }
}
