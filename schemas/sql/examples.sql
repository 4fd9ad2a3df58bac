-- one row per (atom, kind, rank) of the autoencoder $autoencoder, at most $n a kind
-- top: contexts by highest activation, ties by context_id; random: activations by smallest priority
with ranked as (
    select
        atom, 'top' as kind, context_id, pos, act,
        row_number() over (partition by atom order by act desc, context_id) - 1 as rank
    from top
    where autoencoder = $autoencoder
    union all
    select
        atom, 'random' as kind, context_id, pos, act,
        row_number() over (partition by atom order by priority, context_id, pos) - 1 as rank
    from samples
    where autoencoder = $autoencoder
)
select atom, kind, rank::integer as rank, context_id, pos, act
from ranked
where rank < $n
order by atom, kind, rank
