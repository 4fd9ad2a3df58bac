-- one row per atom that fires on tokens where one atom fires: n_both such tokens, share_of_atom of the one's,
-- phi correlates whether they fire, pearson how strongly; both over all counted tokens, zeros included
create or replace macro coactive_atoms(autoencoder_, atom_) as table
    with one as (
        select context_id, pos, act
        from latents
        where autoencoder = autoencoder_ and atom = atom_
    ),
    pairs as (
        select latents.atom, count(*) as n_both, sum(one.act::double * latents.act) as product
        from latents join one using (context_id, pos)
        where autoencoder = autoencoder_ and atom <> atom_
        group by latents.atom
    ),
    moments_of as (
        select
            atom, n_tokens::double as n_tokens, n_active::double as n_active, mean_act,
            mean_act_squared - mean_act * mean_act as variance
        from atoms
        where autoencoder = autoencoder_
    )
    select
        pairs.atom,
        n_both,
        n_both / a.n_active as share_of_atom,
        (n_both * a.n_tokens - a.n_active * b.n_active)
            / sqrt(a.n_active * b.n_active * (a.n_tokens - a.n_active) * (a.n_tokens - b.n_active)) as phi,
        (product / a.n_tokens - a.mean_act * b.mean_act) / sqrt(a.variance * b.variance) as pearson
    from pairs join moments_of as b using (atom), moments_of as a
    where a.atom = atom_
    order by pearson desc, pairs.atom;
