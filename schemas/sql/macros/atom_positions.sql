-- one row per position in the context at which one atom fires: n activations, density among the tokens there, mean act
create or replace macro atom_positions(autoencoder_, atom_) as table
    with lengths as (
        select len(token_ids) as n_tokens, count(*) as n_contexts
        from contexts
        where corpus in (select corpus from runs where autoencoder = autoencoder_)
        group by n_tokens
    ),
    active as (
        select pos, count(*) as n, avg(act) as mean_act
        from latents
        where autoencoder = autoencoder_ and atom = atom_
        group by pos
    )
    select pos, n, n / (select sum(n_contexts) from lengths where n_tokens > pos) as density, mean_act
    from active
    order by pos;
