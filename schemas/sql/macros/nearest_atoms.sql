-- one row per other atom, nearest first: the cosine of its decoder row with one atom's
-- other_ names an autoencoder of the same width whose atoms are searched in the place of the atom's own
create or replace macro nearest_atoms(autoencoder_, atom_, other_ := null) as table
    with one as (
        select direction from decoders where autoencoder = autoencoder_ and atom = atom_
    )
    select atom, list_cosine_similarity(decoders.direction, one.direction) as cosine
    from decoders, one
    where autoencoder = coalesce(other_, autoencoder_) and (autoencoder, atom) <> (autoencoder_, atom_)
    order by cosine desc, atom;
