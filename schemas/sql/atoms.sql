-- one row per atom of the autoencoder $autoencoder, atoms that never fired included
-- moments are over all $n_tokens counted tokens, zeros included: mean_act = E[a], skew = E[a^3] / E[a^2]^1.5,
-- kurtosis = E[a^4] / E[a^2]^2; both are null for an atom that never fired
with merged as (
    -- ordered sums: floating-point addition is not associative, and a lake must not depend on the order of threads
    select
        atom,
        sum(n_active)::bigint as n_active,
        sum(sum_act order by corpus, run) / $n_tokens as mean_act,
        sum(sum_act2 order by corpus, run) / $n_tokens as mean_act_squared,
        sum(sum_act3 order by corpus, run) / $n_tokens as mean_act_cubed,
        sum(sum_act4 order by corpus, run) / $n_tokens as mean_act_fourth,
        max(max_act)::double as max_act
    from moments
    where autoencoder = $autoencoder
    group by atom
),
numbered as (
    select range::integer as atom from range($n_latents)
)
select
    numbered.atom,
    coalesce(n_active, 0) as n_active,
    $n_tokens::bigint as n_tokens,
    coalesce(n_active, 0) / $n_tokens::double as density,
    coalesce(mean_act, 0.0) as mean_act,
    coalesce(mean_act_squared, 0.0) as mean_act_squared,
    mean_act_cubed / pow(mean_act_squared, 1.5) as skew,
    mean_act_fourth / pow(mean_act_squared, 2) as kurtosis,
    coalesce(max_act, 0.0) as max_act
from numbered left join merged using (atom)
order by numbered.atom
