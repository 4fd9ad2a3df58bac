-- one row per token of one context
create or replace macro context_tokens(context_id_) as table
    with positions as (
        select corpus, unnest(token_ids) as token_id, unnest(range(len(token_ids))) as pos
        from contexts
        where context_id = context_id_
    )
    select pos, token_id, token
    from positions join vocabulary using (corpus, token_id)
    order by pos;
