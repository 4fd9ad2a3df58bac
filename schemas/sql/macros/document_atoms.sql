-- one row per atom that fires in one document, strongest first
create or replace macro document_atoms(autoencoder_, doc_id_) as table
    select atom, count(*) as n_active, max(act) as max_act
    from latents_by_token
    where autoencoder = autoencoder_ and context_id in (select context_id from contexts where doc_id = doc_id_)
    group by atom
    order by max_act desc, atom;
