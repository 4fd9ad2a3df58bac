-- one row per document in which one atom fires, most often first
create or replace macro atom_documents(autoencoder_, atom_) as table
    select corpus, doc_id, any_value(external_id) as external_id, count(*) as n_active, max(act) as max_act
    from latents join contexts using (context_id) join documents using (corpus, doc_id)
    where autoencoder = autoencoder_ and atom = atom_
    group by corpus, doc_id
    order by n_active desc, corpus, doc_id;
