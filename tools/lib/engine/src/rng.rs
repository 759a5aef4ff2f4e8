//! Randomness as a pure function of what it is for.
//!
//! Philox 4×32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
//! SC 2011) turns a key and a counter into 128 random bits. The counter names
//! the use: which row of the data, which step, which position, which layer and
//! module. So a mask can be drawn again in the backward pass, on another device,
//! in another packing or after a resume, and nothing has to be stored.

/// What a draw is for; part of the counter, so that no two uses share bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Purpose {
    /// Initial values of adapter weights.
    Init = 1,
    /// Adapter dropout.
    Dropout = 2,
    /// Choosing the next token.
    Sample = 3,
    /// The order of rows.
    Shuffle = 4,
    /// Noise on the embeddings.
    Neftune = 5,
    /// Weights that are random, for measurements.
    Weights = 6,
}

/// The round multipliers and key increments of the paper.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox 4×32 with ten rounds.
#[inline(always)]
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let (mut k, mut c) = (key, counter);
    for _ in 0..10 {
        let p0 = u64::from(MULTIPLIERS[0]).wrapping_mul(u64::from(c[0]));
        let p1 = u64::from(MULTIPLIERS[1]).wrapping_mul(u64::from(c[2]));
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ k[1],
            p0 as u32,
        ];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    c
}

/// The two halves of a seed.
#[inline(always)]
fn key(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// Names one stream: a purpose in one layer and module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// The run's seed; every value is a seed, 0 too.
    pub seed: u64,
    /// What the draws are for.
    pub purpose: Purpose,
    /// Layer number, at most 1,023.
    pub layer: u32,
    /// Module number in the layer, at most 15.
    pub module: u32,
}

impl Stream {
    /// The stream's part of the counter, to which the number of a block is added:
    /// purpose in 4 bits, module in 4, layer in 10, block in 14.
    #[inline(always)]
    pub fn tag(&self) -> u32 {
        (self.purpose as u32) << 28 | self.module << 24 | self.layer << 14
    }

    /// The 128 bits numbered `block` (at most 16,383) at `(x, y, z)` of this stream.
    #[inline(always)]
    pub fn bits(&self, x: u32, y: u32, z: u32, block: u32) -> [u32; 4] {
        philox(key(self.seed), [x, y, z, self.tag() | block])
    }
}

/// A number in `[0, 1)` with 24 random bits.
pub fn unit_f32(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// A number in `[0, 1)` with 53 random bits.
pub fn unit_f64(high: u32, low: u32) -> f64 {
    let bits = u64::from(high) << 32 | u64::from(low);
    (bits >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
}

/// Values that one block of a dropout or noise stream decides: 16 bits each.
pub const KEEP_BLOCK: usize = 8;

/// Adds to one token's features noise that is uniform in ±`bound`.
///
/// Feature `i` takes half-word `i % 8` of block `i / 8` at `(row, step, position)`,
/// low half-words first: one of 65,536 values, evenly spaced and symmetric.
#[inline(always)]
pub fn add_noise(stream: &Stream, [row, step, position]: [u32; 3], bound: f32, x: &mut [f32]) {
    for (block, x) in (0..).zip(x.chunks_mut(KEEP_BLOCK)) {
        let words = stream.bits(row, step, position, block);
        for (i, x) in x.iter_mut().enumerate() {
            let draw = (words[i / 2] >> (16 * (i % 2))) & 0xffff;
            *x += (2 * draw as i32 - 65_535) as f32 * (1.0 / 65_536.0) * bound;
        }
    }
}

/// The threshold under which a 16-bit draw drops its value: `p` to within 1/131,072.
pub fn drop_threshold(p: f32) -> u16 {
    (f64::from(p) * 65_536.0).round().clamp(0.0, 65_535.0) as u16
}

/// Writes dropout factors of one token from feature `first_block * KEEP_BLOCK`
/// on: 0 where dropped, else `scale`.
///
/// Feature `i` is decided by half-word `i % 8` of block `i / 8` at
/// `(row, step, position)`, low half-words first: dropped if below `threshold`.
#[inline(always)]
pub fn dropout_factors(
    stream: &Stream,
    [row, step, position]: [u32; 3],
    first_block: u32,
    (threshold, scale): (u16, f32),
    out: &mut [f32],
) {
    for (block, out) in (first_block..).zip(out.chunks_mut(KEEP_BLOCK)) {
        let words = stream.bits(row, step, position, block);
        for (i, o) in out.iter_mut().enumerate() {
            let draw = (words[i / 2] >> (16 * (i % 2))) as u16;
            *o = if draw < threshold { 0.0 } else { scale };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with the reference implementation (Random123,
    /// `kat_vectors`, philox4x32 10).
    #[test]
    fn known_answers() {
        let cases = [
            (
                [0; 2],
                [0; 4],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [0xffff_ffff; 2],
                [0xffff_ffff; 4],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (k, c, want) in cases {
            assert_eq!(philox(k, c), want, "key {k:x?} counter {c:x?}");
        }
    }

    #[test]
    fn streams_do_not_meet() {
        let at = |purpose, layer, module, block| {
            Stream {
                seed: 7,
                purpose,
                layer,
                module,
            }
            .bits(1, 2, 3, block)
        };
        let base = at(Purpose::Dropout, 5, 3, 9);
        assert_ne!(base, at(Purpose::Init, 5, 3, 9));
        assert_ne!(base, at(Purpose::Dropout, 6, 3, 9));
        assert_ne!(base, at(Purpose::Dropout, 5, 4, 9));
        assert_ne!(base, at(Purpose::Dropout, 5, 3, 10));
    }

    #[test]
    fn dropout_drops_the_asked_share() {
        let stream = Stream {
            seed: 0,
            purpose: Purpose::Dropout,
            layer: 0,
            module: 0,
        };
        let mut out = vec![0.0; 100_003];
        dropout_factors(
            &stream,
            [4, 1, 2],
            0,
            (drop_threshold(0.05), 1.0 / 0.95),
            &mut out,
        );
        let dropped = out.iter().filter(|&&x| x == 0.0).count() as f64;
        // Binomial(100003, 0.05): mean 5000, sd 69; five sd.
        assert!((dropped - 5000.0).abs() < 345.0, "{dropped}");
    }
}
