-- one row per atom that fires on one token, strongest first
create or replace macro token_latents(autoencoder_, context_id_, pos_) as table
    select atom, act
    from latents_by_token
    where autoencoder = autoencoder_ and context_id = context_id_ and pos = pos_
    order by act desc, atom;
