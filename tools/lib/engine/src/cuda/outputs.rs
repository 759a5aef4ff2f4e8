//! The gradients on the outputs' side of a group's adapters, by `x Aᵀ` and of `B`, from one
//! reading of the gradient by the outputs (`cuda/outputs.cu`).

use half::bf16;

use super::driver::{Address, Arg};
use super::few::{LowRank, MEMBERS};
use super::memory::piece;
use super::{AT_ONCE, Cuda, IntoArg, args};

/// Largest rank of a member.
const MOST_RANK: usize = 16;

/// Outputs, of one member, and tokens that a block takes at a time.
const SPAN: usize = 512;
const TOKENS: usize = 32;

/// Bytes of shared memory: of two turns what is read, and sums of eight warps.
const SHARED: usize = 2 * TOKENS * (SPAN + 8 + MOST_RANK + 8) * size_of::<bf16>()
    + 8 * TOKENS * (MOST_RANK + 4) * size_of::<f32>();

/// Whether all of these members go this way.
pub(super) fn suits(members: &[LowRank]) -> bool {
    !members.is_empty() && members.iter().all(|m| m.rank <= MOST_RANK)
}

/// Spans of so many outputs.
fn spans(outputs: impl Iterator<Item = usize>) -> usize {
    outputs.map(|outputs| outputs.div_ceil(SPAN)).sum()
}

/// Turns that so many tokens take.
fn turns(tokens: usize) -> usize {
    tokens.div_ceil(TOKENS)
}

/// Values of the sums by `x Aᵀ`, `[spans, tokens, 16]`, and of `B`, `[blocks, 512, 16]`.
fn sums(spans: usize, tokens: usize, blocks: usize) -> [usize; 2] {
    [spans * tokens, blocks * SPAN].map(|rows| rows * MOST_RANK)
}

/// Scratch bytes for members of so many outputs each, or for some of them; also where their
/// ranks will be too large, for more of them must never need less.
pub(super) fn scratch(outputs: impl Iterator<Item = usize>, tokens: usize) -> usize {
    let spans = spans(outputs);
    let blocks = AT_ONCE.max(spans).min(spans * turns(tokens));
    sums(spans, tokens, blocks).map(piece::<f32>).iter().sum()
}

/// Where the gradients by a member's `x Aᵀ` and of its `B` go.
pub(super) struct Gradients {
    /// First column of the former.
    pub column: usize,
    /// The latter; null where they are not wanted.
    pub b: Address,
}

impl Cuda {
    /// `dxa [tokens, gradients] = scale · dout B`, zero in columns that are no rank, and
    /// `dB += scale · doutᵀ xa` of each member. `dout` is `[tokens, width]`, `xa`
    /// `[tokens, ranks]`; `room` has [`scratch`] bytes.
    pub(super) fn b_gradients(
        &self,
        members: &[(LowRank, Gradients)],
        (dout, [tokens, width]): (Address, [usize; 2]),
        (xa, ranks): (Address, usize),
        (dxa, gradients): (Address, usize),
        room: Address,
    ) {
        if tokens == 0 {
            return;
        }
        let spans = spans(members.iter().map(|(m, _)| m.outputs));
        // As many stretches of the tokens as it takes to have blocks enough.
        let stretches = (AT_ONCE / spans).min(turns(tokens)).max(1);
        let [by_xa, _] = sums(spans, tokens, spans * stretches);
        let (by_xa, by_b) = (room, room + piece::<f32>(by_xa) as u64);
        // An argument of each member, and of those that are not there.
        let three = |of: &dyn Fn(&LowRank, &Gradients) -> Arg, none: Arg| -> Vec<Arg> {
            let given = members.iter().map(|(m, to)| of(m, to));
            given.chain(std::iter::repeat(none)).take(MEMBERS).collect()
        };
        let count =
            |of: fn(&LowRank, &Gradients) -> usize| three(&|m, to| of(m, to).arg(), Arg::U32(0));
        let (rank, outputs) = (count(|m, _| m.rank), count(|m, _| m.outputs));
        let args = [
            args![dout, xa],
            &three(&|m, _| Arg::Pointer(m.b), Arg::Pointer(0))[..],
            args![tokens, width, ranks],
            &rank,
            &count(|m, _| m.rank_at),
            &outputs,
            &count(|m, _| m.column),
            args![by_xa, by_b],
        ];
        let shape = [spans, stretches, 1];
        self.launch_shaped("b_gradients", shape, 256, SHARED, &args.concat());
        let blocks = (tokens * gradients).div_ceil(256);
        let args = [
            args![by_xa, by_b, blocks, spans, stretches, tokens, gradients],
            &rank[..],
            &count(|_, to| to.column),
            &outputs,
            &three(&|m, _| Arg::F32(m.scale), Arg::F32(0.0)),
            args![dxa],
            &three(&|_, to| Arg::Pointer(to.b), Arg::Pointer(0)),
        ];
        let all = blocks + (spans * SPAN * MOST_RANK).div_ceil(256);
        self.launch("b_gradients_sum", all, &args.concat());
    }
}
