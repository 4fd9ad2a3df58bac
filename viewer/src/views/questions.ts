import type { Query } from "../data/query";
import type { Question } from "../parts/sql";

function quoted(text: string): string {
  return `'${text.replaceAll("'", "''")}'`;
}

/** The tokens' strings are those of any corpus that the autoencoder has encoded. */
function logitsSql(name: string, where: string): string {
  const corpus = `(select any_value(corpus) from runs where autoencoder = ${quoted(name)})`;
  const words = `(select token_id, token from vocabulary where corpus = ${corpus})`;
  return `select kind, rank, token, value\nfrom logits join ${words} using (token_id)\n${where}\norder by all`;
}

function sourcesSql(where: string): string {
  const rows = "latents join contexts using (context_id) join documents using (corpus, doc_id)";
  return `select source, count(*) as n\nfrom ${rows}\n${where}\ngroup by source\norder by n desc`;
}

/** What an atom's page shows, as questions to the lake. */
export function atomQuestions(name: string, atom: number): Question[] {
  const ask = (macro: string, ...more: string[]): string => `from ${macro}(${[quoted(name), atom, ...more].join(", ")})`;
  const where = `where autoencoder = ${quoted(name)} and atom = ${atom}`;
  return [
    { title: "Statistics", sql: `from atoms ${where}` },
    { title: "Histogram", sql: ask("atom_histogram") },
    { title: "Top examples", sql: ask("atom_examples", "'top'") },
    { title: "Random examples", sql: ask("atom_examples", "'random'") },
    { title: "Tokens it peaks on", sql: ask("atom_top_tokens") },
    { title: "Direct logits", sql: logitsSql(name, where) },
    { title: "Nearest atoms", sql: `${ask("nearest_atoms")} limit 10` },
    { title: "Atoms that fire together", sql: `${ask("coactive_atoms")} limit 10` },
    { title: "Documents", sql: `${ask("atom_documents")} limit 10` },
    { title: "Sources", sql: sourcesSql(where) },
    { title: "Effects", sql: `select context_id, pos, act, loss_diff, kl from effects ${where}` },
    { title: "Explanation", sql: `select patterns, acts, recall, precision, correlation from explanations ${where}` },
  ];
}

export function dictionaryQuestions(name: string): Question[] {
  const where = `where autoencoder = ${quoted(name)}`;
  return [
    { title: "Densities", sql: `select atom, n_active, density from atoms ${where}` },
    { title: "Dead atoms", sql: `select count(*) filter (n_active = 0) as dead, count(*) as atoms from atoms ${where}` },
    { title: "Quality", sql: `select metric, value from metrics ${where} and phase = 'evaluate'` },
    { title: "Training", sql: `select metric, tokens, value from metrics ${where} and phase = 'train' order by all` },
  ];
}

const EFFECTS = `(
    select atom, avg(loss) as effect_loss, avg(kl) as effect_kl
    from (select autoencoder, atom, unnest(loss_diff) as loss, unnest(kl) as kl from effects)
    where autoencoder = NAME
    group by atom
)`;

const SCORES = `(
    select atom, correlation as explanation_score from explanations where autoencoder = NAME
)`;

/** The list as it is sorted and filtered, but for what is searched for. */
export function listSql(name: string, query: Query): string {
  const { ranges, sort } = query;
  const conditions = ranges.flatMap(([column, [low, high]]) => [
    ...(low === null ? [] : [`${column} >= ${low}`]),
    ...(high === null ? [] : [`${column} <= ${high}`]),
  ]);
  const asked = [sort, ...ranges.map(([column]) => column)];
  const join = (prefix: string, rows: string): string =>
    asked.some((column) => column.startsWith(prefix)) ? `\nleft join ${rows.replace("NAME", () => quoted(name))} using (atom)` : "";
  const more = join("effect_", EFFECTS) + join("explanation_", SCORES);
  const where = [`autoencoder = ${quoted(name)}`, ...conditions].join(" and ");
  return `from atoms${more}\nwhere ${where}\norder by ${sort}${query.falling ? " desc" : ""} nulls last\nlimit 100`;
}
