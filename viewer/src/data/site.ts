import {
  COLUMNS,
  FORMAT,
  type Dictionary,
  type EffectsRow,
  type MetricsRow,
  type PagesRow,
  type Rows,
  type SequencesRow,
  type Site,
} from "../schemas";
import { Cache } from "./cache";
import { DataError } from "./errors";
import { readJson, type Files } from "./files";
import { openTable, readGroup, rows, type Columns } from "./parquet";
import { holds, VOTE_KINDS, type Effect, type Example, type Kind, type Source, type Votes, type VotesAt } from "./source";
import { AtomTable } from "./table";

const EFFECTS = ["kind", "rank", "loss_diff", "kl"] as const;
const VOTES = COLUMNS.effects.filter((name) => name !== "atom" && name !== "kl");

function missing(atom: number, about: Dictionary): DataError {
  const there = about.picked?.length ? about.picked.join(", ") : about.atoms.join(" to ");
  return new DataError(`There is no atom ${atom}: ${about.autoencoder} has atoms ${there} here.`, "missing");
}

function example(row: SequencesRow): Example {
  const acts = new Array<number>(row.tokens.length).fill(0);
  row.pos.forEach((position, i) => (acts[position] = row.acts[i] ?? 0));
  const document = row.external_id || `document ${row.doc_id}`;
  const key = `${row.kind}/${row.rank}`;
  const { act, idx, tokens, source } = row;
  return { key, kind: row.kind as Kind, act, idx, tokens, acts, contextId: row.context_id, source, document };
}

/** The position of an effect's first entry is one after idx, and its entries go to the end of the context. */
function effect(row: Pick<EffectsRow, "loss_diff" | "kl">, length: number): Effect {
  const before = new Array<null>(length - row.loss_diff.length).fill(null);
  return { loss: [...before, ...row.loss_diff], kl: [...before, ...row.kl] };
}

function votesOf(row: Omit<EffectsRow, "atom" | "kl">, length: number): VotesAt {
  const first = length - row.loss_diff.length;
  return (position) => {
    const entry = position - first;
    if (entry < 0 || entry >= row.loss_diff.length) return null;
    const of = (kind: (typeof VOTE_KINDS)[number]): Votes[typeof kind] => {
      const values = row[kind];
      const tokens = row[kind.replace("_by_", "_tokens_by_") as "up_tokens_by_logits"];
      const count = values.length / row.loss_diff.length;
      const from = entry * count;
      return values.slice(from, from + count).map((value, i) => ({ token: tokens[from + i] ?? "", value }));
    };
    return Object.fromEntries(VOTE_KINDS.map((kind) => [kind, of(kind)])) as Votes;
  };
}

/** A site of Parquet files; schemas/site.py says which there are. */
export class SiteSource implements Source {
  readonly complete = true;
  private readonly cache = new Cache(200);

  constructor(private readonly files: Files) {}

  site(signal: AbortSignal): Promise<Site> {
    return this.cache.get("site.json", signal, async (inner) => {
      const site = await readJson<Site>(this.files, "site.json", inner);
      if ((site?.format ?? 0) > FORMAT)
        throw new DataError(`This site has format ${site.format}; this viewer reads ${FORMAT}.`, "broken");
      if (!Array.isArray(site?.autoencoders) || !site.autoencoders.length)
        throw new DataError("site.json lists no autoencoders.", "broken");
      return site;
    });
  }

  about(path: string, signal: AbortSignal): Promise<Dictionary> {
    const name = `${path}/manifest.json`;
    return this.cache.get(name, signal, async (inner) => {
      const about = await readJson<Dictionary>(this.files, name, inner);
      if (!Array.isArray(about?.atoms) || !Array.isArray(about.corpora))
        throw new DataError(`${name} is not a manifest: it lacks atoms or corpora.`, "broken");
      return about;
    });
  }

  atoms(path: string, signal: AbortSignal, progress: (table: AtomTable) => void): Promise<AtomTable> {
    const name = `${path}/atoms.parquet`;
    return this.cache.get(`${name} table`, signal, async (inner) => {
      const { metadata } = await this.open(name, "atoms", inner);
      const table = new AtomTable(Number(metadata.num_rows));
      for (let group = 0; group < metadata.row_groups.length; group += 1) {
        table.append(await this.group(name, "atoms", group, COLUMNS.atoms, inner));
        progress(table);
      }
      return table;
    });
  }

  page(path: string, atom: number, signal: AbortSignal): Promise<PagesRow> {
    return this.cache.get(`${path}/pages ${atom}`, signal, async (inner) => {
      const { about, file } = await this.place(path, "pages", atom, inner);
      const read = await this.cache.get(`${file} rows`, inner, (own) => this.group(file, "pages", 0, COLUMNS.pages, own));
      const found = rows<PagesRow>(read).find((row) => row.atom === atom);
      if (!found) throw missing(atom, about);
      return found;
    });
  }

  examples(path: string, atom: number, signal: AbortSignal): Promise<Example[]> {
    return this.cache.get(`${path}/sequences ${atom}`, signal, async (inner) => {
      const { file, group } = await this.place(path, "sequences", atom, inner);
      const read = await this.group(file, "sequences", group, COLUMNS.sequences, inner);
      return rows<SequencesRow>(read).filter((row) => row.atom === atom).map(example);
    });
  }

  effects(path: string, atom: number, signal: AbortSignal): Promise<Map<string, Effect>> {
    return this.cache.get(`${path}/effects ${atom}`, signal, async (inner) => {
      const lengths = await this.lengths(path, atom, inner);
      const { about, file, group } = await this.place(path, "effects", atom, inner);
      if (!about.votes) return new Map();
      const read = rows(await this.group(file, "effects", group, EFFECTS, inner));
      return new Map(read.map((row) => [`${row.kind}/${row.rank}`, effect(row, lengths(row))]));
    });
  }

  votes(path: string, atom: number, signal: AbortSignal): Promise<Map<string, VotesAt>> {
    return this.cache.get(`${path}/votes ${atom}`, signal, async (inner) => {
      const lengths = await this.lengths(path, atom, inner);
      const { about, file, group } = await this.place(path, "effects", atom, inner);
      if (!about.votes) return new Map();
      const read = rows(await this.group(file, "effects", group, VOTES, inner));
      return new Map(read.map((row) => [`${row.kind}/${row.rank}`, votesOf(row as Omit<EffectsRow, "atom" | "kl">, lengths(row))]));
    });
  }

  metrics(path: string, signal: AbortSignal): Promise<MetricsRow[]> {
    const name = `${path}/metrics.parquet`;
    return this.cache.get(`${name} rows`, signal, async (inner) => {
      const { metadata } = await this.open(name, "metrics", inner);
      const groups = metadata.row_groups.map((_, group) => this.group(name, "metrics", group, COLUMNS.metrics, inner));
      return (await Promise.all(groups)).flatMap((group) => rows<MetricsRow>(group));
    });
  }

  /** How many tokens an atom's examples have, by kind and rank. */
  private async lengths(path: string, atom: number, signal: AbortSignal): Promise<(row: { kind: string; rank: number }) => number> {
    const examples = await this.examples(path, atom, signal);
    const known = new Map(examples.map((one) => [one.key, one.tokens.length]));
    return (row) => known.get(`${row.kind}/${row.rank}`) ?? 0;
  }

  private async place(
    path: string,
    table: keyof Rows,
    atom: number,
    signal: AbortSignal,
  ): Promise<{ about: Dictionary; file: string; group: number }> {
    const about = await this.about(path, signal);
    const size = about.atoms_per_block ?? 16;
    if (!holds(about, atom)) throw missing(atom, about);
    return { about, file: `${path}/${table}/${Math.floor(atom / size)}.parquet`, group: atom % size };
  }

  private open(path: string, table: keyof Rows, signal: AbortSignal): Promise<Awaited<ReturnType<typeof openTable>>> {
    return this.cache.get(path, signal, (inner) => openTable(this.files, path, table, inner));
  }

  /** Columns of a row group; a file that a live server has made anew in between is opened again, once. */
  private async group<T extends keyof Rows, C extends keyof Rows[T] & string>(
    path: string,
    table: T,
    group: number,
    columns: readonly C[],
    signal: AbortSignal,
  ): Promise<Columns<Pick<Rows[T], C>>> {
    try {
      return await readGroup<T, C>(this.files, await this.open(path, table, signal), group, columns, signal);
    } catch (error) {
      if (!(error instanceof DataError) || error.kind !== "changed") throw error;
      this.cache.forget(path);
      return readGroup<T, C>(this.files, await this.open(path, table, signal), group, columns, signal);
    }
  }
}
