-- one row per quantile of one atom's activations, exact: q of them are at most act
create or replace macro atom_quantiles(autoencoder_, atom_) as table
    with wanted as (
        select [0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0] as qs
    ),
    found as (
        select quantile_disc(act, [0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0]) as acts
        from latents
        where autoencoder = autoencoder_ and atom = atom_
    )
    select unnest(qs)::double as q, unnest(acts) as act
    from wanted, found
    order by q;
