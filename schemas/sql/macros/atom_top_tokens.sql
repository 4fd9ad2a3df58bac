-- one row per token string of one atom's top examples: how often the atom peaks on it
create or replace macro atom_top_tokens(autoencoder_, atom_) as table
    select token, count(*) as n, max(act) as max_act
    from atom_examples(autoencoder_, atom_, 'top')
    group by token
    order by n desc, max_act desc, token;
