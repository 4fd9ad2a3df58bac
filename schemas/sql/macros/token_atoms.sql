-- one row per atom that fires on a token string: n activations there, their share of the atom's own, and of all
-- occurrences of the token; the first token of a context is an occurrence even where a model's is masked
create or replace macro token_atoms(autoencoder_, token_) as table
    with occurrences as (
        select context_id, unnest(range(len(token_ids))) as pos, corpus, unnest(token_ids) as token_id
        from contexts
        where corpus in (select corpus from runs where autoencoder = autoencoder_)
    ),
    wanted as (
        select context_id, pos
        from occurrences semi join (from vocabulary where token = token_) using (corpus, token_id)
    )
    select
        atom,
        count(*) as n,
        count(*) / any_value(atoms.n_active) as share_of_atom,
        count(*) / (select count(*) from wanted) as share_of_token,
        avg(act) as mean_act
    from latents_by_token join wanted using (context_id, pos) join atoms using (autoencoder, atom)
    where autoencoder = autoencoder_
    group by atom
    order by share_of_atom desc, atom;
