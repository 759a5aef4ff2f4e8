//! Low-rank products of inputs under dropout, whose masks are drawn inside them
//! (`cuda/thin.cu`). By way of copies with the masks applied, each product of each member
//! would read its input, write a copy and read that; this reads the input once for all
//! members, a fifth of the bytes, and takes as long as its instructions (docs/gpu.md).
//! Large ranks need several passes, which draw every mask again: there the copies are
//! made after all.

use half::bf16;

use super::driver::{Address, Arg};
use super::memory::piece;
use super::{AT_ONCE, Cuda, args};
use crate::Dropout;
use crate::rng::{self, Purpose};

/// Members of a launch, and of every group there is: queries, keys and values.
const MEMBERS: usize = 3;

/// Ranks of a tile of `thin_product`, and tiles of a block: few, or as many as it can have.
const LOW: usize = 8;
const BREADTHS: [usize; 2] = [2, 6];

/// Bytes of shared memory there: of three stages eight warps' eight slots of 16 bytes a lane.
const SLOTS: usize = 3 * 8 * 8 * 32 * 16;

/// Ranks of a tile of the gradients' kernels, and tiles of a block of `thin_factors`.
const HIGH: usize = 16;
const THREE: usize = 3;

/// Columns that a member's rank takes in the gradient by `x Aᵀ`: whole tiles.
pub(super) fn padded(rank: usize) -> usize {
    rank.next_multiple_of(HIGH)
}

/// The most columns that so many members' ranks can take there.
pub(super) fn padded_most(ranks: usize, members: usize) -> usize {
    let most = ranks + members * (HIGH - 1);
    most - most % HIGH
}

/// Inputs of a block of the gradients' kernels.
const WIDE: usize = 64;

/// Into how many stretches the tokens are cut for the gradients of `A`, so that there
/// are blocks enough; each has 512 tokens at least.
fn stretches(tokens: usize, inputs: usize) -> usize {
    let blocks = 256usize.div_ceil(inputs.div_ceil(WIDE));
    blocks.min(tokens / 512).max(1)
}

/// How many blocks of `thin_inputs` share so many tiles of tokens, for each of so many
/// columns: such that the rounds in which all blocks run take the fewest tiles one after
/// the other, and of equals the most blocks, for a device that has room for fewer. Four
/// rounds at most: each block reads its part of the factors.
fn blocks_along(tiles: usize, columns: usize) -> usize {
    let most = (4 * AT_ONCE).div_ceil(columns).min(tiles);
    let turns = |blocks: usize| (blocks * columns).div_ceil(AT_ONCE) * tiles.div_ceil(blocks);
    (1..=most).rev().min_by_key(|&b| turns(b)).unwrap_or(0)
}

/// Whether a group of so many members, of this rank together, makes copies of its input.
/// The product and the gradient of `A` take 48 ranks at a time; in two passes their
/// instructions take as long as a copy's bytes, in more longer (docs/gpu.md).
pub(super) fn copies(ranks: usize, members: usize) -> bool {
    ranks > 64 * members
}

/// Bytes for a copy of the input, or for the stretches' sums, which are none where there
/// is but one stretch. More ranks never take less: a copy is more than the sums of a
/// group that makes none.
pub(super) fn scratch([tokens, inputs]: [usize; 2], ranks: usize, members: usize) -> usize {
    match (copies(ranks, members), stretches(tokens, inputs)) {
        (true, _) => piece::<bf16>(tokens * inputs),
        (false, 1) => 0,
        (false, several) => piece::<f32>(several * ranks * inputs),
    }
}

/// What the members with an adapter differ in; the ranks of those that are not there
/// are 0.
#[derive(Default)]
pub(super) struct Members {
    ranks: [usize; MEMBERS],
    modules: [u32; MEMBERS],
}

impl Members {
    /// Of these `(rank, module)`.
    pub fn new(members: impl Iterator<Item = (usize, u32)>) -> Self {
        let mut all = Self::default();
        for (i, (rank, module)) in members.enumerate() {
            assert!(i < MEMBERS, "a group with more than {MEMBERS} adapters");
            (all.ranks[i], all.modules[i]) = (rank, module);
        }
        all
    }

    /// Tiles of so many ranks, none of two members.
    fn tiles(&self, ranks: usize) -> usize {
        self.ranks.iter().map(|rank| rank.div_ceil(ranks)).sum()
    }
}

/// A group's products with what dropout keeps of its input.
pub(super) struct Thin<'a> {
    pub cuda: &'a Cuda,
    pub dropout: &'a Dropout<'a, Cuda>,
    pub layer: u32,
    pub members: Members,
    pub tokens: usize,
    pub inputs: usize,
    /// Every `A`, one below the other, rounded.
    pub factors: Address,
}

impl Thin<'_> {
    /// By what kept values are multiplied.
    pub fn scale(&self) -> f32 {
        1.0 / (1.0 - self.dropout.p)
    }

    fn stream(&self, module: u32) -> rng::Stream {
        rng::Stream {
            seed: self.dropout.seed,
            purpose: Purpose::Dropout,
            layer: self.layer,
            module,
        }
    }

    /// What a module keeps of its input, not scaled.
    pub fn copy(&self, x: Address, module: u32, to: Address) {
        let args = args![
            x,
            self.dropout.rows.first(self.tokens),
            self.dropout.positions.first(self.tokens),
            self.inputs,
            Arg::U64(self.dropout.seed),
            self.dropout.step,
            self.stream(module).tag(),
            u32::from(rng::drop_threshold(self.dropout.p)),
            to,
        ];
        self.cuda.launch("thin_copy", self.tokens, args);
    }

    /// The arguments from the operands to those of one kernel alone.
    fn args(&self, operands: [Address; 2], own: &[Arg]) -> Vec<Arg> {
        let Dropout { p, seed, step, .. } = *self.dropout;
        let tag = |module| self.stream(module).tag();
        let ([a, b, c], [d, e, f]) = (self.members.ranks, self.members.modules.map(tag));
        let shared = args![
            operands[0],
            operands[1],
            self.dropout.rows.first(self.tokens),
            self.dropout.positions.first(self.tokens),
            self.tokens,
            self.inputs,
            Arg::U64(seed),
            step,
            u32::from(rng::drop_threshold(p)),
            self.scale(),
            a,
            b,
            c,
            d,
            e,
            f,
        ];
        [shared, own].concat()
    }

    /// `xa = drop(x) Aᵀ`
    pub fn product(&self, x: Address, xa: Address) {
        // The fewer warps share their tokens, the more share what they read of the
        // factors; but all blocks are to run at once. Where that leaves room, members
        // have blocks of their own.
        let (tokens, ranks) = (self.tokens.div_ceil(16), self.members.tiles(LOW));
        let blocks = |split: usize| tokens.div_ceil(8 / split);
        let mut splits = [8, 4, 2].into_iter();
        let split = splits.find(|&split| blocks(split) <= AT_ONCE).unwrap_or(2);
        let [few, all] = BREADTHS;
        let breadth = match blocks(split) * ranks.div_ceil(few) <= AT_ONCE {
            true => few,
            false => all,
        };
        let args = self.args([x, self.factors], args![split, breadth, xa]);
        let grid = [blocks(split), ranks.div_ceil(breadth), 1];
        self.cuda
            .launch_shaped("thin_product", grid, 256, SLOTS, &args);
    }

    /// `dA += dxaᵀ drop(x)` of each member, at these places.
    pub fn factors(
        &self,
        x: Address,
        dxa: Address,
        to: impl Iterator<Item = Address>,
        partial: Address,
    ) {
        let mut grads = [0; MEMBERS];
        grads.iter_mut().zip(to).for_each(|(grads, to)| *grads = to);
        let [a, b, c] = grads;
        let stretches = stretches(self.tokens, self.inputs);
        let partial = if stretches > 1 { partial } else { 0 };
        let args = self.args([x, dxa], args![a, b, c, partial]);
        let columns = self.inputs.div_ceil(WIDE);
        let passes = self.members.tiles(HIGH).div_ceil(THREE);
        let grid = [columns, passes, stretches];
        if self.tokens > 0 {
            self.cuda.launch_shaped("thin_factors", grid, 256, 0, &args);
        }
        if partial != 0 {
            let ranks: usize = self.members.ranks.iter().sum();
            let [first, second, _] = self.members.ranks;
            let args = args![
                partial,
                stretches,
                self.inputs,
                self.scale(),
                first,
                second,
                ranks,
                a,
                b,
                c,
            ];
            let grid = [self.inputs.div_ceil(256), ranks, 1];
            self.cuda.launch_shaped("thin_sum", grid, 256, 0, args);
        }
    }

    /// `dx = Σ drop(dxa A)` over the members.
    pub fn inputs(&self, dxa: Address, dx: Address) {
        let args = self.args([dxa, self.factors], args![dx]);
        let columns = self.inputs.div_ceil(WIDE);
        let grid = [columns, blocks_along(self.tokens.div_ceil(128), columns), 1];
        self.cuda.launch_shaped("thin_inputs", grid, 256, 0, &args);
    }
}

#[cfg(test)]
mod tests {
    use super::blocks_along;

    #[test]
    fn blocks_come_in_whole_rounds() {
        // 4,096 inputs and 12,288, by tiles of 128 tokens: 4 rounds of 8, 3 of 32.
        assert_eq!(blocks_along(128, 64), 16);
        assert_eq!(blocks_along(128, 192), 4);
        // No more than there are tiles; no tokens, no blocks.
        assert_eq!(blocks_along(2, 64), 2);
        assert_eq!(blocks_along(1, 300), 1);
        assert_eq!(blocks_along(0, 64), 0);
    }
}
