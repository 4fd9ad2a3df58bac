// Made by python -m sae.schemas.typescript from schemas/site.py and schemas/viewer.py: edit those.
export const FORMAT = 1;
export const EMBEDDED = "site-data";

/** one row per atom; peak_tokens are those on which its top examples peak, the most frequent first, logit_tokens those whose logits its decoder row raises most */
export interface AtomsRow {
  atom: number;
  n_active: number;
  density: number;
  mean_act: number;
  mean_act_squared: number;
  max_act: number;
  skew: number | null;
  kurtosis: number | null;
  effect_loss: number | null;
  effect_kl: number | null;
  explanation: string | null;
  explanation_score: number | null;
  peak_tokens: string[];
  logit_tokens: string[];
}

/** one row per atom: what its page shows but for sequences; lists of one thing are in order and of one length */
export interface PagesRow {
  atom: number;
  n_active: number;
  density: number;
  mean_act: number;
  mean_act_squared: number;
  max_act: number;
  skew: number | null;
  kurtosis: number | null;
  effect_loss: number | null;
  effect_kl: number | null;
  explanation: string | null;
  explanation_score: number | null;
  hist_bin: number[];
  hist_n: number[];
  up_tokens: string[];
  up_logits: number[];
  down_tokens: string[];
  down_logits: number[];
  near: number[];
  near_cosine: number[];
  coactive: number[];
  coactive_correlation: number[];
  source: string[];
  source_share: number[];
  patterns: string[];
}

/** one row per example: a context and the atom's activations > 0 in it; it was chosen for act, at position idx. kind is top (contexts by falling activation) or random (a uniform sample of activations) */
export interface SequencesRow {
  atom: number;
  kind: string;
  rank: number;
  act: number;
  idx: number;
  context_id: number;
  doc_id: number;
  corpus: string;
  source: string;
  external_id: string;
  tokens: string[];
  pos: number[];
  acts: number[];
}

/** one row per example whose effect is known: what ablating the atom at idx changes, an entry for each later token, the first at idx + 1; loss_diff = loss(clean) - loss(ablated), in nats: negative where the atom helped */
export interface EffectsRow {
  atom: number;
  kind: string;
  rank: number;
  loss_diff: number[];
  kl: number[];
  up_tokens_by_logits: string[];
  up_by_logits: number[];
  down_tokens_by_logits: string[];
  down_by_logits: number[];
  up_tokens_by_probs: string[];
  up_by_probs: number[];
  down_tokens_by_probs: string[];
  down_by_probs: number[];
}

/** as the lake's table metrics, of one autoencoder */
export interface MetricsRow {
  phase: string;
  metric: string;
  step: number;
  tokens: number;
  value: number;
}

export interface Rows {
  atoms: AtomsRow;
  pages: PagesRow;
  sequences: SequencesRow;
  effects: EffectsRow;
  metrics: MetricsRow;
}

export const COLUMNS: { [T in keyof Rows]: readonly (keyof Rows[T])[] } = {
  atoms: [
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
    "explanation",
    "explanation_score",
    "peak_tokens",
    "logit_tokens",
  ],
  pages: [
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
    "explanation",
    "explanation_score",
    "hist_bin",
    "hist_n",
    "up_tokens",
    "up_logits",
    "down_tokens",
    "down_logits",
    "near",
    "near_cosine",
    "coactive",
    "coactive_correlation",
    "source",
    "source_share",
    "patterns",
  ],
  sequences: [
    "atom",
    "kind",
    "rank",
    "act",
    "idx",
    "context_id",
    "doc_id",
    "corpus",
    "source",
    "external_id",
    "tokens",
    "pos",
    "acts",
  ],
  effects: [
    "atom",
    "kind",
    "rank",
    "loss_diff",
    "kl",
    "up_tokens_by_logits",
    "up_by_logits",
    "down_tokens_by_logits",
    "down_by_logits",
    "up_tokens_by_probs",
    "up_by_probs",
    "down_tokens_by_probs",
    "down_by_probs",
  ],
  metrics: [
    "phase",
    "metric",
    "step",
    "tokens",
    "value",
  ],
};

/** An autoencoder of the site and the folder of its files, relative to site.json. */
export interface Entry {
  name: string;
  path: string;
}

/** What site.json says. `live`: a server makes the files from a lake; `subject`: it also encodes typed text. */
export interface Site {
  format?: number;
  autoencoders: Entry[];
  live?: boolean;
  subject?: boolean;
  warning?: string | null;
}

/** What an autoencoder's files were made from. */
export interface Dictionary {
  autoencoder: string;
  checkpoint: string;
  model: string;
  hook: string;
  masked_positions: number[];
  corpora: string[];
  n_tokens: number;
  trained_tokens: number;
  n_latents: number;
  k: number;
  bin_width: number;
  atoms: [number, number];
  sign_convention: string;
  lake_version: number;
  versions: Record<string, string>;
  format?: string;
  complete?: boolean;
  source?: string;
  seconds?: number | null;
  atoms_per_block?: number;
  picked?: number[];
  votes: number;
}

/** A text for POST api/encode. */
export interface Typed {
  autoencoder: string;
  text: string;
}

/** The answer: its tokens, and of each the atoms that are most active there, most active first. */
export interface Encoded {
  tokens: string[];
  atoms: number[][];
  acts: number[][];
}

/** A context with the atom's activation at every token; it was chosen for `act`, at position `idx`. */
export interface Sequence {
  tokens: string[];
  acts: number[];
  act: number;
  idx: number;
  doc_id: number | string;
  density: number;
  token_ints: number[];
  ablate_loss_diff?: number[] | null;
  kl?: (number | null)[] | null;
  top_upvotes_logits?: (number[] | null)[] | null;
  top_downvotes_logits?: (number[] | null)[] | null;
  top_upvotes_probs?: (number[] | null)[] | null;
  top_downvotes_probs?: (number[] | null)[] | null;
  top_upvote_tokens_logits?: (string[] | null)[] | null;
  top_downvote_tokens_logits?: (string[] | null)[] | null;
  top_upvote_tokens_probs?: (string[] | null)[] | null;
  top_downvote_tokens_probs?: (string[] | null)[] | null;
}

/** One atom: its statistics over all tokens, zeros included, its histogram and its example sequences. */
export interface AtomFile {
  density: number;
  mean_act: number | null;
  mean_act_squared: number | null;
  skew: number | null;
  kurtosis: number | null;
  hist: Record<string, number>;
  top: Sequence[];
  random: Sequence[];
}
