-- one row per nonzero latent of the atoms $low to $high of the autoencoder $autoencoder, in the order of the table
select atom, context_id, pos, act
from latents
where autoencoder = $autoencoder and atom between $low and $high
order by atom, context_id, pos
