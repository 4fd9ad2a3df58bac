-- one row per context whose text holds a string, case and spaces as given; the text of every context is put together
create or replace macro contexts_with(text_) as table
    with positions as (
        select
            context_id, corpus, doc_id,
            unnest(token_ids) as token_id,
            unnest(range(len(token_ids))) as pos
        from contexts
    ),
    texts as (
        select context_id, any_value(corpus) as corpus, any_value(doc_id) as doc_id,
            string_agg(token, '' order by pos) as text
        from positions join vocabulary using (corpus, token_id)
        group by context_id
    )
    select context_id, corpus, doc_id, text
    from texts
    where contains(text, text_)
    order by context_id;
