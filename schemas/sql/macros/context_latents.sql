-- one row per nonzero latent of one context, with the token that it fires on
create or replace macro context_latents(autoencoder_, context_id_) as table
    with positions as (
        select corpus, unnest(token_ids) as token_id, unnest(range(len(token_ids))) as pos
        from contexts
        where context_id = context_id_
    )
    select pos, token, atom, act
    from latents_by_token join positions using (pos) join vocabulary using (corpus, token_id)
    where autoencoder = autoencoder_ and context_id = context_id_
    order by pos, act desc, atom;
