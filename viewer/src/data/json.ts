import type { AtomFile, MetricsRow, PagesRow, Sequence, Site } from "../schemas";
import { Cache } from "./cache";
import { DataError } from "./errors";
import { readJson, type Files } from "./files";
import {
  VOTE_KINDS,
  type About,
  type Effect,
  type Example,
  type Kind,
  type Source,
  type Vote,
  type VoteKind,
  type Votes,
  type VotesAt,
} from "./source";
import type { AtomTable } from "./table";

const REFERENCE_WIDTH = 0.2;

type Entries = (number[] | null)[] | null | undefined;
type Tokens = (string[] | null)[] | null | undefined;

function example(kind: Kind, rank: number, sequence: Sequence): Example {
  const { act, idx, tokens, acts, doc_id } = sequence;
  return { key: `${kind}/${rank}`, kind, act, idx, tokens, acts, contextId: null, source: "", document: `document ${doc_id}` };
}

/** Entry j of a list of effects is about token j + 1. */
function shifted(values: (number | null)[] | null | undefined, idx: number): (number | null)[] {
  return [null, ...(values ?? [])].map((value, position) => (position > idx ? value : null));
}

function listed(sequence: Sequence, kind: VoteKind): [Tokens, Entries] {
  const by = kind.endsWith("logits") ? "logits" : "probs";
  return kind.startsWith("up")
    ? [sequence[`top_upvote_tokens_${by}`], sequence[`top_upvotes_${by}`]]
    : [sequence[`top_downvote_tokens_${by}`], sequence[`top_downvotes_${by}`]];
}

function votesOf(sequence: Sequence): VotesAt {
  const at = (kind: VoteKind, position: number): Vote[] => {
    const [tokens, values] = listed(sequence, kind);
    return (values?.[position - 1] ?? []).map((value, i) => ({ token: tokens?.[position - 1]?.[i] ?? "", value }));
  };
  return (position) =>
    position > sequence.idx ? (Object.fromEntries(VOTE_KINDS.map((kind) => [kind, at(kind, position)])) as Votes) : null;
}

function sequences(file: AtomFile): { example: Example; sequence: Sequence }[] {
  return (["top", "random"] as const).flatMap((kind) =>
    file[kind].map((sequence, rank) => ({ example: example(kind, rank, sequence), sequence })),
  );
}

function page(atom: number, file: AtomFile, binWidth: number): PagesRow {
  const bins = Object.entries(file.hist).map(([bin, count]) => [Number(bin), count] as const);
  bins.sort(([one], [other]) => one - other);
  const numbers = { density: file.density, mean_act: file.mean_act ?? NaN, mean_act_squared: file.mean_act_squared ?? NaN };
  const strongest = file.top[0]?.act ?? (bins.at(-1)?.[0] ?? 0) * binWidth;
  const unknown = { effect_loss: null, effect_kl: null, explanation: null, explanation_score: null };
  const none = { up_tokens: [], up_logits: [], down_tokens: [], down_logits: [], patterns: [] };
  const nobody = { near: [], near_cosine: [], coactive: [], coactive_correlation: [], source: [], source_share: [] };
  return {
    ...{ atom, ...numbers, ...unknown, ...none, ...nobody },
    ...{ skew: file.skew, kurtosis: file.kurtosis, max_act: strongest },
    n_active: bins.reduce((sum, [, count]) => sum + count, 0),
    hist_bin: bins.map(([bin]) => bin),
    hist_n: bins.map(([, count]) => count),
  };
}

/** The reference viewer's files: one of an atom, and one with effects that is complete as well. */
export class JsonSource implements Source {
  readonly complete = false;
  private readonly cache = new Cache(50);

  constructor(
    private readonly files: Files,
    private readonly prefix: string,
  ) {}

  async site(): Promise<Site> {
    return { format: 1, autoencoders: [{ name: this.prefix, path: this.prefix }], live: false, subject: false };
  }

  about(path: string, signal: AbortSignal): Promise<About | null> {
    return this.cache.get("manifest", signal, async (inner) => {
      try {
        return { ...(await readJson<Omit<About, "votes">>(this.files, `${path}/manifest.json`, inner)), votes: 1 };
      } catch (error) {
        // The reference writes no manifest: atoms can be looked at without one.
        if (error instanceof DataError && error.kind === "missing") return null;
        throw error;
      }
    });
  }

  atoms(path: string): Promise<AtomTable> {
    return Promise.reject(new DataError(`The JSON files of ${path} have no list of atoms.`, "missing"));
  }

  async page(path: string, atom: number, signal: AbortSignal): Promise<PagesRow> {
    const [file, about] = await Promise.all([this.read(path, atom, signal), this.about(path, signal)]);
    return page(atom, file, about?.bin_width ?? REFERENCE_WIDTH);
  }

  async examples(path: string, atom: number, signal: AbortSignal): Promise<Example[]> {
    return sequences(await this.read(path, atom, signal)).map(({ example: one }) => one);
  }

  async effects(path: string, atom: number, signal: AbortSignal): Promise<Map<string, Effect>> {
    const known = sequences(await this.read(path, atom, signal)).filter(({ sequence }) => sequence.ablate_loss_diff);
    return new Map(
      known.map(({ example: { key, idx }, sequence }) => {
        return [key, { loss: shifted(sequence.ablate_loss_diff, idx), kl: shifted(sequence.kl, idx) }];
      }),
    );
  }

  async votes(path: string, atom: number, signal: AbortSignal): Promise<Map<string, VotesAt>> {
    return new Map(sequences(await this.read(path, atom, signal)).map(({ example: { key }, sequence }) => [key, votesOf(sequence)]));
  }

  async metrics(): Promise<MetricsRow[]> {
    return [];
  }

  private read(path: string, atom: number, signal: AbortSignal): Promise<AtomFile> {
    return this.cache.get(`${atom}`, signal, async (inner) => {
      const name = `${path}/atoms/${atom}`;
      const file = await this.either(`${name}-ablated.json`, `${name}.json`, inner);
      if (file === null || typeof file !== "object" || !file.hist || !Array.isArray(file.top) || !Array.isArray(file.random))
        throw new DataError(`${name}.json is not an atom's file: it lacks hist, top or random.`, "broken");
      return file;
    });
  }

  private async either(first: string, second: string, signal: AbortSignal): Promise<AtomFile> {
    try {
      return await readJson<AtomFile>(this.files, first, signal);
    } catch (error) {
      if (!(error instanceof DataError) || error.kind !== "missing") throw error;
      return readJson<AtomFile>(this.files, second, signal);
    }
  }
}
