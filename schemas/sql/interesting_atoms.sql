-- one row per atom, $n of them: rare enough to mean something, strong, and each peaking on another token
-- tokens are those on which the atom's top examples peak, most frequent first; context is the strongest example
with peaks as (
    select
        examples.atom, examples.rank, vocabulary.token, contexts.corpus, contexts.token_ids, examples.pos::integer as pos
    from examples
    join atoms using (autoencoder, atom)
    join contexts using (context_id)
    join vocabulary
        on vocabulary.corpus = contexts.corpus and vocabulary.token_id = contexts.token_ids[examples.pos + 1]
    where autoencoder = $autoencoder and kind = 'top' and density between 2e-4 and 2e-2
),
counted as (
    select atom, token, count(*) as n, min(rank) as best from peaks group by atom, token
),
described as (
    select
        atom,
        arg_max(token, (n, -best, token)) as main_token,
        max(n) / sum(n) as consistency,
        list(trim(token) order by n desc, best, token)[:4] as tokens
    from counted
    group by atom
),
one_a_token as (
    select described.*, atoms.density, atoms.max_act
    from described join atoms using (atom)
    where autoencoder = $autoencoder and length(trim(main_token)) > 3
    qualify row_number() over (partition by lower(trim(main_token)) order by consistency * max_act desc, atom) = 1
),
chosen as (
    select * from one_a_token order by consistency * max_act desc, atom limit $n
),
words as (
    select
        peaks.atom, peaks.pos, peaks.corpus,
        unnest(token_ids[greatest(1, pos - 5) : pos + 6]) as token_id,
        unnest(range(greatest(0, pos - 6), least(len(token_ids), pos + 6)::bigint)) as token_pos
    from peaks join chosen using (atom)
    where peaks.rank = 0
),
snippets as (
    select
        atom,
        string_agg(case when token_pos = pos then '[' || trim(token) || ']' else token end, '' order by token_pos)
            as context
    from words join vocabulary using (corpus, token_id)
    group by atom
)
select atom, density, max_act, tokens, trim(replace(context, chr(10), ' ')) as context
from chosen join snippets using (atom)
order by consistency * max_act desc, atom
