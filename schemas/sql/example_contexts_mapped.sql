-- one row per example, with the tokens of its context as context_of reads them from arrays
create or replace view example_contexts as
    with found as (
        select examples.*, context_of(context_id) as context from examples
    )
    select * exclude (context), context.corpus, context.doc_id, context.token_ids
    from found;
