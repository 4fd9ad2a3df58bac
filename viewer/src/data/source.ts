import type { Dictionary, MetricsRow, PagesRow, Site } from "../schemas";
import type { AtomTable } from "./table";

export type Kind = "top" | "random";

/** A context in which an atom fires; `acts` has an entry for every token. */
export interface Example {
  key: string;
  kind: Kind;
  act: number;
  idx: number;
  tokens: string[];
  acts: number[];
  contextId: number | null;
  source: string;
  document: string;
}

/** What ablating the atom changes, by position; null up to the ablated one. */
export interface Effect {
  loss: (number | null)[];
  kl: (number | null)[];
}

export interface Vote {
  token: string;
  value: number;
}

export const VOTE_KINDS = ["up_by_logits", "down_by_logits", "up_by_probs", "down_by_probs"] as const;
export type VoteKind = (typeof VOTE_KINDS)[number];
export type Votes = Record<VoteKind, Vote[]>;
/** The votes for the token at a position of an example. */
export type VotesAt = (position: number) => Votes | null;

/** What is known of an autoencoder without looking at its atoms. */
export type About = Omit<Dictionary, "format" | "complete" | "source" | "atoms_per_block" | "seconds">;

/** Whether an atom is among those that are there. */
export function holds({ atoms: [first, last], picked = [] }: Pick<About, "atoms" | "picked">, atom: number): boolean {
  return picked.length ? picked.includes(atom) : atom >= first && atom <= last;
}

/** Where the pages come from. Every promise is rejected with a DataError, or an AbortError once `signal` says so. */
export interface Source {
  /** Whether there are a list of atoms, metrics, direct logits and neighbours. */
  readonly complete: boolean;
  site(signal: AbortSignal): Promise<Site>;
  about(path: string, signal: AbortSignal): Promise<About | null>;
  /** The table of all atoms; `progress` is called with what is there so far. */
  atoms(path: string, signal: AbortSignal, progress: (table: AtomTable) => void): Promise<AtomTable>;
  page(path: string, atom: number, signal: AbortSignal): Promise<PagesRow>;
  examples(path: string, atom: number, signal: AbortSignal): Promise<Example[]>;
  /** Effects by the key of their example. */
  effects(path: string, atom: number, signal: AbortSignal): Promise<Map<string, Effect>>;
  votes(path: string, atom: number, signal: AbortSignal): Promise<Map<string, VotesAt>>;
  metrics(path: string, signal: AbortSignal): Promise<MetricsRow[]>;
}
