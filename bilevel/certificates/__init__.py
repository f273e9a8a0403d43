"""How wrong a solution, an adjoint and a hypergradient are: proofs where constants are known, estimates where they are not."""
