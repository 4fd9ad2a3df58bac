import type { Statistic } from "../data/table";

/** What statistics are called, in a column's head and in full. */
export const LABELS: Record<Statistic, { short: string; title: string }> = {
  atom: { short: "atom", title: "number of the atom" },
  n_active: { short: "fires on", title: "tokens on which it fires" },
  density: { short: "density", title: "share of tokens on which it fires" },
  mean_act: { short: "mean", title: "mean activation over all tokens" },
  mean_act_squared: { short: "mean of squares", title: "mean of squared activations over all tokens" },
  max_act: { short: "max", title: "largest activation" },
  skew: { short: "skew", title: "skew, E[a³] / E[a²]^1.5" },
  kurtosis: { short: "kurtosis", title: "kurtosis, E[a⁴] / E[a²]²" },
  effect_loss: { short: "loss effect", title: "mean effect on the loss of later tokens, in nats; negative where it helps" },
  effect_kl: { short: "KL effect", title: "mean KL divergence of predictions of later tokens, in nats" },
  explanation_score: { short: "score", title: "correlation of what the explanation predicts with activations on other text" },
};
