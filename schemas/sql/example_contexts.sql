-- one row per example, with the tokens of its context
create or replace view example_contexts as
    select examples.*, contexts.corpus, contexts.doc_id, contexts.token_ids
    from examples join contexts using (context_id);
