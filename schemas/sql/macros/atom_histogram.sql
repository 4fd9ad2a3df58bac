-- one row per bin of one atom: activations in (lower, upper], merged over runs
create or replace macro atom_histogram(autoencoder_, atom_) as table
    select
        bin,
        (bin - 1) * any_value(bin_width) as lower,
        bin * any_value(bin_width) as upper,
        sum(n)::bigint as n
    from histograms join autoencoders using (autoencoder)
    where histograms.autoencoder = autoencoder_ and atom = atom_
    group by bin
    order by bin;
