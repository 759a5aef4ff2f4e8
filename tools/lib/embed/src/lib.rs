//! Sentence vectors: all-MiniLM-L6-v2 on the CPU, so that two texts which say
//! the same thing in other words can be found by a dot product.
//!
//! A vector depends on its text alone. A batch holds texts of one length in
//! tokens, so that none is padded, and every product stays on the thread that
//! asked for it: then each row of a product is summed in the same order whatever
//! stands above and below it. Padding would change the last bits of a vector with
//! the company it keeps, and removing one row of a data set could move another
//! pair's cosine across the threshold. On one core of a Xeon with
//! AVX-512, 171 tweets a second; padded batches of 32 do 125.
//!
//! Pooling is the mean over all tokens, `[CLS]` and `[SEP]` included, then the
//! L2 norm, as the model's own `1_Pooling` and `2_Normalize` say; texts longer
//! than [`MAX_TOKENS`] are cut, as `sentence_bert_config.json` says. The
//! tokenizer file's own padding (to 128) and truncation (at 128) are overridden.

use std::cmp::Reverse;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs, io};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tokenizers::{Tokenizer, TruncationParams};

/// Length of a vector.
pub const DIM: usize = 384;

/// Tokens of a text that are looked at, `[CLS]` and `[SEP]` included.
pub const MAX_TOKENS: usize = 256;

/// Tokens that go through the model at once: enough rows to make a product
/// worth its packing of the weights, few enough to stay in the second cache.
const BATCH_TOKENS: usize = 512;

/// Where `make models` puts the model, from the root of the project.
pub const DEFAULT_DIR: &str = "data/cache/models/all-MiniLM-L6-v2";

/// The files that are read, with their SHA-256: those of
/// `sentence-transformers/all-MiniLM-L6-v2` at revision
/// `c9745ed1d9f207416be6d2e6f8de32d1f16199bf` on the Hugging Face hub.
pub const FILES: [(&str, &str); 3] = [
    (
        "config.json",
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    ),
    (
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    (
        "tokenizer.json",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    ),
];

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A model file cannot be read.
    #[error("{}: {cause}; `make models` fetches the sentence model", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A model file is not the one these vectors are defined by.
    #[error("{}: sha256 is {found}, expected {expected}; `make models` fetches it again", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// What it has.
        found: String,
        /// What it should have.
        expected: &'static str,
    },
    /// The model could not be built or run: out of memory, most likely.
    #[error("sentence model: {0}")]
    Model(String),
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Self::Model(e.to_string())
    }
}

/// The loaded model: about 90 MB, shared by all threads.
pub struct Embedder {
    model: BertModel,
    tokenizer: Tokenizer,
}

impl Embedder {
    /// Reads the model from `dir` and checks each file's hash.
    ///
    /// From here on `gemm` never splits a product in this process over threads
    /// by itself: the threads are used for texts, and pools that nest lose a
    /// fifth of the speed.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let [config, weights, tokenizer] =
            FILES.map(|(name, sha256)| read_checked(&dir.join(name), sha256));
        gemm::set_threading_threshold(usize::MAX);

        let config: Config =
            serde_json::from_slice(&config?).map_err(|e| Error::Model(e.to_string()))?;
        let weights = VarBuilder::from_buffered_safetensors(weights?, DType::F32, &Device::Cpu)?;
        let model = BertModel::load(weights, &config)?;

        let tokenizer_error = |e: tokenizers::Error| Error::Model(format!("tokenizer: {e}"));
        let mut tokenizer = Tokenizer::from_bytes(tokenizer?).map_err(tokenizer_error)?;
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(Some(TruncationParams {
                max_length: MAX_TOKENS,
                ..Default::default()
            }))
            .map_err(tokenizer_error)?;
        Ok(Self { model, tokenizer })
    }

    /// Unit vectors of the texts, `[texts, DIM]`, in the order of the texts and
    /// the same to the last bit for any number of threads (rayon's current
    /// pool). `progress` is told, from any thread, how many are done so far.
    pub fn embed<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        progress: impl Fn(usize) + Sync,
    ) -> Result<Vec<f32>, Error> {
        let tokens: Vec<Vec<u32>> = texts
            .par_iter()
            .map(|text| self.tokenize(text.as_ref()))
            .collect::<Result<_, Error>>()?;
        // Longest first, so that no thread is left with much to do at the end.
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&i| Reverse(tokens[i].len()));
        let batches: Vec<&[usize]> = order
            .chunk_by(|&a, &b| tokens[a].len() == tokens[b].len())
            .flat_map(|same| same.chunks((BATCH_TOKENS / tokens[same[0]].len()).max(1)))
            .collect();

        let done = AtomicUsize::new(0);
        let rows: Vec<Vec<f32>> = batches
            .par_iter()
            .with_max_len(1)
            .map(|batch| {
                let rows = self.forward(batch.iter().map(|&i| tokens[i].as_slice()))?;
                progress(done.fetch_add(batch.len(), Ordering::Relaxed) + batch.len());
                Ok(rows)
            })
            .collect::<Result<_, Error>>()?;

        let mut vectors = vec![0f32; texts.len() * DIM];
        for (&i, row) in order
            .iter()
            .zip(rows.iter().flat_map(|rows| rows.chunks_exact(DIM)))
        {
            vectors[i * DIM..][..DIM].copy_from_slice(row);
        }
        Ok(vectors)
    }

    /// Token ids with `[CLS]` and `[SEP]`; so never empty.
    fn tokenize(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self
            .tokenizer
            .encode(text, true)
            .map_err(|e| Error::Model(format!("tokenizer: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Unit vectors of texts that have the same number of tokens, row after row.
    fn forward<'a>(
        &self,
        batch: impl ExactSizeIterator<Item = &'a [u32]>,
    ) -> Result<Vec<f32>, Error> {
        let count = batch.len();
        let ids: Vec<u32> = batch.flatten().copied().collect();
        let shape = (count, ids.len() / count);
        let ids = Tensor::from_vec(ids, shape, &Device::Cpu)?;
        // [texts, tokens, DIM] → [texts, DIM]
        let states = self.model.forward(&ids, &ids.zeros_like()?, None)?;
        let mut rows: Vec<f32> = states.mean(1)?.flatten_all()?.to_vec1()?;
        for row in rows.chunks_exact_mut(DIM) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            row.iter_mut().for_each(|x| *x /= norm);
        }
        Ok(rows)
    }
}

fn read_checked(path: &Path, expected: &'static str) -> Result<Vec<u8>, Error> {
    let read = || match path.metadata()?.is_file() {
        true => fs::read(path),
        // A pipe could be waited for without end.
        false => Err(io::Error::other("is no regular file")),
    };
    let bytes = read().map_err(|cause| Error::Missing {
        path: path.to_owned(),
        cause,
    })?;
    let found: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if found == expected {
        Ok(bytes)
    } else {
        Err(Error::Hash {
            path: path.to_owned(),
            found,
            expected,
        })
    }
}
