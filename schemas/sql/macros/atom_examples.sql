-- one row per example of one atom; kind_ is 'top' or 'random'; the text marks the activating token as [[token]]
create or replace macro atom_examples(autoencoder_, atom_, kind_) as table
    -- materialized: without it DuckDB 2.0.0 fails on the next join ("dict-surviving join ... not single-source")
    with positions as materialized (
        select
            rank, context_id, pos, act, corpus, doc_id,
            unnest(token_ids) as token_id,
            unnest(range(len(token_ids))) as token_pos
        from example_contexts
        where autoencoder = autoencoder_ and atom = atom_ and kind = kind_
    )
    select
        rank,
        any_value(act) as act,
        any_value(token) filter (where token_pos = pos) as token,
        string_agg(case when token_pos = pos then '[[' || token || ']]' else token end, '' order by token_pos) as text,
        any_value(documents.source) as source,
        any_value(documents.external_id) as external_id,
        any_value(context_id) as context_id,
        any_value(pos) as pos
    from positions
    join vocabulary using (corpus, token_id)
    join documents using (corpus, doc_id)
    group by rank
    order by rank;
