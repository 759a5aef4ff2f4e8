//! Products of a few tokens: a decoding step, its logits, or a pass over one short row.
//! Quantised weights are read as they are stored: there the floor is reading them once,
//! and decoding them to memory first moves nine times as much as the codes take. So are
//! the factors of adapters, where the floor is a kernel's own time.

use super::driver::Address;
use super::{AT_ONCE, Buffer, Cuda, Matrix, Store, args};

/// Most tokens of such a product. Beyond, every block's reading of its tokens costs
/// more than decoding once: predicted, to be tuned on a GPU (docs/gpu.md).
const MOST: usize = 32;

/// Most tokens of a product with factors as they are stored: beyond, cuBLAS' tiles are
/// worth rounding the factors first. Predicted, as above.
const MOST_OF_FACTORS: usize = 512;

/// Inputs that a warp takes at a time; every width of a Qwen3 is a multiple.
const PIECE: usize = 128;

/// Outputs of a block.
const OUTPUTS: usize = 32;

/// Tokens and ranks of a block of `few_ranks`, and inputs that it takes at a time.
const RANKS_TILE: [usize; 2] = [16, 8];
const RANKS_TURN: usize = 1024;

/// Most blocks that share the inputs there.
const MOST_STRETCHES: usize = 8;

/// Of how many tiles of `few_ranks` a ticket is kept: more have blocks enough by themselves.
pub(super) const TICKETS: usize = AT_ONCE;

/// Tokens that a block of `few_update` takes at a time, and its outputs.
const UPDATE_TILE: [usize; 2] = [16, 256];

/// Members of a launch.
pub(super) const MEMBERS: usize = 3;

/// Whether a product with quantised weights goes this way.
pub(super) fn suits(tokens: usize, inputs: usize) -> bool {
    tokens <= MOST && inputs.is_multiple_of(PIECE)
}

/// Whether products of so many tokens read factors as they are stored.
pub(super) fn suits_factors(tokens: usize) -> bool {
    tokens <= MOST_OF_FACTORS
}

/// One member's update, as the kernels take it: `scale · x Aᵀ Bᵀ`.
#[derive(Clone, Copy)]
pub(super) struct LowRank {
    /// `[rank, inputs]`, sixteen bytes aligned.
    pub a: Address,
    /// `[outputs, rank]`
    pub b: Address,
    pub rank: usize,
    /// Its first column of `x Aᵀ`.
    pub rank_at: usize,
    pub outputs: usize,
    /// Its first output; this and the number of outputs are multiples of 8.
    pub column: usize,
    pub scale: f32,
}

impl LowRank {
    /// Of no ranks and no outputs.
    const NONE: Self = Self {
        a: 0,
        b: 0,
        rank: 0,
        rank_at: 0,
        outputs: 0,
        column: 0,
        scale: 0.0,
    };

    /// Three, as a launch takes them.
    fn three(members: &[Self]) -> [Self; MEMBERS] {
        let mut three = [Self::NONE; MEMBERS];
        three[..members.len()].copy_from_slice(members);
        three
    }
}

/// One quantised weight, as the kernel takes it.
struct Member {
    codes: Address,
    nested: Address,
    absmax: Address,
    offset: f32,
    outputs: usize,
    column: usize,
}

impl Member {
    /// Of no outputs.
    const NONE: Self = Self {
        codes: 0,
        nested: 0,
        absmax: 0,
        offset: 0.0,
        outputs: 0,
        column: 0,
    };

    fn new(matrix: &Matrix, column: usize) -> Self {
        let whole = |b: &Buffer<u8>| b.first(b.len());
        let Store::Nf4 {
            codes,
            absmax,
            nested,
        } = &matrix.store
        else {
            panic!("a dense weight has no codes");
        };
        Self {
            codes: whole(codes),
            nested: nested.as_ref().map_or(0, |(codes, _)| whole(codes)),
            absmax: absmax.first(absmax.len()),
            offset: nested.as_ref().map_or(0.0, |(_, offset)| *offset),
            outputs: matrix.rows,
            column,
        }
    }
}

/// Of the kernels for up to 8, 16 and 32 tokens, the one for so many.
fn sized(tokens: usize, kernels: [&'static str; 3]) -> &'static str {
    kernels[match tokens {
        0..=8 => 0,
        9..=16 => 1,
        _ => 2,
    }]
}

impl Cuda {
    /// `out = x Wᵀ (+ scale · xa Bᵀ) (+ residual)`, in the columns from each weight's own
    /// on. All are quantised and share `inputs`; `xa` is `[tokens, ranks]`, `out` and
    /// `residual` are `[tokens, width]`.
    pub(super) fn few_tokens<'a>(
        &self,
        weights: impl Iterator<Item = (&'a Matrix, usize, Option<LowRank>)>,
        (x, [tokens, inputs]): (Address, [usize; 2]),
        (xa, ranks): (Address, usize),
        residual: Option<Address>,
        (out, width): (Address, usize),
    ) {
        let kernels = ["nf4_product_8", "nf4_product_16", "nf4_product_32"];
        let kernel = sized(tokens, kernels);
        let member = |(w, column, low): (&Matrix, usize, Option<LowRank>)| {
            (Member::new(w, column), low.unwrap_or(LowRank::NONE))
        };
        let weights: Vec<_> = weights.map(member).collect();
        for weights in weights.chunks(MEMBERS) {
            let mut args = Vec::new();
            for i in 0..MEMBERS {
                let w = weights.get(i).map_or(&Member::NONE, |(w, _)| w);
                args.extend(args![
                    w.codes, w.nested, w.absmax, w.offset, w.outputs, w.column
                ]);
            }
            args.extend(args![xa, ranks]);
            for i in 0..MEMBERS {
                let low = weights.get(i).map_or(&LowRank::NONE, |(_, low)| low);
                args.extend(args![low.b, low.rank, low.rank_at, low.scale]);
            }
            args.extend(args![
                self.map.first(256),
                x,
                tokens,
                inputs,
                residual.unwrap_or(0),
                width,
                out,
            ]);
            let blocks = weights.iter().map(|(w, _)| w.outputs.div_ceil(OUTPUTS));
            self.launch(kernel, blocks.sum(), &args);
        }
    }

    /// `xa [tokens, Σ rank] = x Aᵀ`; `spare` is room for sums, and its bytes.
    pub(super) fn few_ranks(
        &self,
        members: &[LowRank],
        (x, [tokens, inputs]): (Address, [usize; 2]),
        (spare, bytes): (Address, usize),
        xa: Address,
    ) {
        let [a, b, c] = LowRank::three(members);
        let [token_tile, rank_tile] = RANKS_TILE;
        let grid: [usize; 2] = [
            tokens.div_ceil(token_tile),
            members.iter().map(|m| m.rank.div_ceil(rank_tile)).sum(),
        ];
        let tiles = grid[0] * grid[1];
        let fitting = bytes / (tiles.max(1) * token_tile * rank_tile * size_of::<f32>());
        let useful = inputs.div_ceil(RANKS_TURN).min(MOST_STRETCHES);
        let stretches = useful.min(AT_ONCE / tiles.max(1)).min(fitting).max(1);
        let args = args![
            x,
            a.a,
            b.a,
            c.a,
            tokens,
            inputs,
            a.rank,
            b.rank,
            c.rank,
            spare,
            self.tickets.first(TICKETS),
            xa,
        ];
        let grid = [grid[0], grid[1], stretches];
        self.launch_shaped("few_ranks", grid, 256, 0, args);
    }

    /// `out = scale · xa Bᵀ (+ residual)` in each member's columns; `xa` is `[tokens, ranks]`,
    /// `out` and `residual` are `[tokens, width]`.
    pub(super) fn few_update(
        &self,
        members: &[LowRank],
        (xa, [tokens, ranks]): (Address, [usize; 2]),
        residual: Option<Address>,
        (out, width): (Address, usize),
    ) {
        let [a, b, c] = LowRank::three(members);
        let args = args![
            xa,
            a.b,
            b.b,
            c.b,
            tokens,
            ranks,
            a.rank,
            b.rank,
            c.rank,
            a.rank_at,
            b.rank_at,
            c.rank_at,
            a.outputs,
            b.outputs,
            c.outputs,
            a.column,
            b.column,
            c.column,
            a.scale,
            b.scale,
            c.scale,
            residual.unwrap_or(0),
            width,
            out,
        ];
        let [token_tile, output_tile] = UPDATE_TILE;
        let blocks = members.iter().map(|m| m.outputs.div_ceil(output_tile));
        let blocks: usize = blocks.sum();
        // The fewer, the more tokens share what a block reads of B.
        let most = AT_ONCE.div_ceil(blocks.max(1));
        let stretches = tokens.div_ceil(token_tile).min(most);
        self.launch_shaped("few_update", [blocks, stretches, 1], 256, 0, args);
    }

    /// `out [tokens, vocabulary] = x headᵀ` in f32, of a quantised head.
    pub(super) fn few_logits(
        &self,
        head: &Matrix,
        (x, [tokens, inputs]): (Address, [usize; 2]),
        out: Address,
    ) {
        let w = Member::new(head, 0);
        let args = args![
            w.codes,
            w.nested,
            w.absmax,
            w.offset,
            w.outputs,
            self.map.first(256),
            x,
            tokens,
            inputs,
            out,
        ];
        let kernels = ["nf4_logits_8", "nf4_logits_16", "nf4_logits_32"];
        let blocks = w.outputs.div_ceil(OUTPUTS);
        self.launch(sized(tokens, kernels), blocks, args);
    }
}
