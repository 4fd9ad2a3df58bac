-- one row per atom $low to $high of the autoencoder $autoencoder: statistics, histogram, example sequences
-- a sequence is an example's context with the atom's nonzero activations in it, rounded to $decimals decimals
with chosen as (
    select atom, kind, rank, context_id, pos, round(act::double, $decimals) as act
    from examples
    where autoencoder = $autoencoder and atom between $low and $high
),
active as (
    -- a context that is chosen twice is gathered once
    select
        atom,
        context_id,
        list(pos order by pos) as positions,
        list(round(act::double, $decimals) order by pos) as acts
    from latents semi join chosen using (atom, context_id)
    where autoencoder = $autoencoder and atom between $low and $high
    group by atom, context_id
),
sequences as (
    select
        atom,
        kind,
        list({
            'act': act, 'idx': pos, 'doc_id': doc_id, 'corpus': corpus, 'token_ids': token_ids,
            'positions': positions, 'acts': acts
        } order by rank) as examples
    from chosen join active using (atom, context_id) join contexts using (context_id)
    group by atom, kind
),
counts as (
    select atom, bin, sum(n)::bigint as n
    from histograms
    where autoencoder = $autoencoder and atom between $low and $high
    group by atom, bin
),
hist as (
    select atom, list(bin order by bin) as bins, list(n order by bin) as counts
    from counts
    group by atom
)
select
    atoms.atom, atoms.density, atoms.mean_act, atoms.mean_act_squared, atoms.skew, atoms.kurtosis,
    coalesce(hist.bins, []) as bins,
    coalesce(hist.counts, []) as counts,
    top_sequences.examples as top,
    random_sequences.examples as random
from atoms
left join hist using (atom)
left join sequences as top_sequences on top_sequences.atom = atoms.atom and top_sequences.kind = 'top'
left join sequences as random_sequences on random_sequences.atom = atoms.atom and random_sequences.kind = 'random'
where atoms.autoencoder = $autoencoder and atoms.atom between $low and $high
order by atoms.atom
