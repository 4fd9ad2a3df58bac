-- one row per atom that fires in one document, strongest first
create or replace macro document_atoms(autoencoder_, doc_id_) as table
    select atom, count(*) as n_active, max(act) as max_act
    from latents
    where autoencoder = autoencoder_
        and context_id between (select min(context_id) from contexts where doc_id = doc_id_)
        and (select max(context_id) from contexts where doc_id = doc_id_)
    group by atom
    order by max_act desc, atom;
