//! Whether what a run writes has room, found out before it begins.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cli::Failure;
use qwen3::{LoraLayout, OptimiserKind, Seen};
use settings::Training;

use crate::memory::Size;

/// What is not counted one by one: figures, settings, the card.
const BESIDE: u64 = 4 << 20;

/// What a run writes into its folder, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Of one checkpoint.
    checkpoint: u64,
    /// So many are there at once: one is written before the oldest goes.
    checkpoints: u64,
    /// The adapter, and the best one so far if that is kept.
    adapters: u64,
    /// Figures and the like, and the names of the rows.
    beside: u64,
}

impl Need {
    /// Of a run of so many steps over rows of those names.
    pub fn new(
        training: &Training,
        layout: &LoraLayout,
        kind: &OptimiserKind,
        steps: u64,
        seen: &Seen,
    ) -> Self {
        let values = (layout.len() * size_of::<f32>()) as u64;
        let made = match training.save_steps {
            0 => 1,
            every => steps.div_ceil(every),
        };
        let checkpoints = match training.save_total_limit as u64 {
            0 => made,
            kept => made.min(kept.saturating_add(1)),
        };
        Self {
            checkpoint: values + kind.moment_bytes(layout) as u64,
            checkpoints,
            adapters: values * (1 + u64::from(training.load_best_model_at_end)),
            beside: BESIDE + seen.most_bytes() as u64,
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.of_checkpoints()
            .saturating_add(self.adapters + self.beside)
    }

    fn of_checkpoints(&self) -> u64 {
        self.checkpoints.saturating_mul(self.checkpoint)
    }

    /// Refuses a folder whose disk has no room for it. What is in there already is
    /// not needed again: checkpoints are replaced, and what killed saves left is removed.
    ///
    /// # Errors
    /// If there is none, or the disk does not tell.
    pub fn check(&self, out: &Path) -> Result<()> {
        let (there, free) = (size_of_folder(out), free(out)?);
        match self.total().saturating_sub(there) <= free {
            true => Ok(()),
            false => Err(Failure::World(self.refusal(out, there, free)).into()),
        }
    }

    /// What is needed by part, and what helps.
    fn refusal(&self, out: &Path, there: u64, free: u64) -> String {
        let size = |bytes: u64| Size(bytes as usize);
        let already = match there {
            0 => String::new(),
            _ => format!(", {} of that being there already", size(there)),
        };
        format!(
            "--out {}: the disk has {} free, and {} are needed: {} for checkpoints, {} at a time, {} for the \
             adapter, {} for figures and the like{already}; make room, lower training.save_total_limit, or name a \
             folder on another disk",
            out.display(),
            size(free),
            size(self.total().saturating_sub(there)),
            size(self.of_checkpoints()),
            self.checkpoints,
            size(self.adapters),
            size(self.beside),
        )
    }
}

/// Bytes that the disk of `path` has for us, or of the nearest folder above that there is.
pub fn free(path: &Path) -> Result<u64> {
    let path = std::path::absolute(path).with_context(|| path.display().to_string())?;
    let there = path.ancestors().find(|path| path.exists());
    let there = there.unwrap_or(Path::new("/"));
    let disk = rustix::fs::statvfs(there).with_context(|| there.display().to_string())?;
    Ok(disk.f_bavail * disk.f_frsize)
}

/// Bytes of all files below a folder; of what cannot be read, none.
fn size_of_folder(folder: &Path) -> u64 {
    let mut bytes = 0;
    let mut folders: Vec<PathBuf> = vec![folder.into()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(found) if found.is_dir() => folders.push(entry.path()),
                Ok(found) => bytes += found.len(),
                Err(_) => {}
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn as_many_checkpoints_as_there_will_be() {
        let config = qwen3::Config {
            vocab_size: 100,
            hidden_size: 64,
            intermediate_size: 128,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 32,
            max_positions: 64,
            rms_eps: 1e-6,
            rope_theta: 1e6,
            tied: true,
        };
        let layout = LoraLayout::new(&config, &qwen3::AdapterConfig::new(8, 16.0)).unwrap();
        let values = 4 * layout.len() as u64;
        let need = |steps, save_steps, save_total_limit, best| {
            let training = Training {
                save_steps,
                save_total_limit,
                load_best_model_at_end: best,
                ..Training::default()
            };
            let (kind, seen) = (OptimiserKind::default(), Seen::default());
            let need = Need::new(&training, &layout, &kind, steps, &seen);
            (need.total() - need.beside) / values
        };
        // Each holds values and both moments; beside them there is the adapter.
        assert_eq!(need(100, 10, 3, false), 4 * 3 + 1);
        assert_eq!(need(100, 10, 3, true), 4 * 3 + 2);
        assert_eq!(need(100, 10, 0, false), 10 * 3 + 1);
        assert_eq!(need(25, 10, 3, false), 3 * 3 + 1);
        assert_eq!(need(25, 0, 3, false), 3 + 1);
        assert_eq!(need(u64::MAX, 1, 0, false), (u64::MAX - BESIDE) / values);

        // The names of a million rows, also of those that --init-adapter had.
        let mut before = Seen::default();
        for row in 0..1_000_000_u32 {
            before.add(&format!("{row:032x}"), record::Split::Train);
        }
        let mut seen = Seen::default();
        seen.add_trained(&before);
        let (training, kind) = (Training::default(), OptimiserKind::default());
        let [with, without] = [&seen, &Seen::default()]
            .map(|seen| Need::new(&training, &layout, &kind, 1, seen).total());
        assert!(with - without >= seen.to_lines().len() as u64);
    }

    #[test]
    fn the_parts_make_up_what_is_needed() {
        let need = Need {
            checkpoint: 2_000_000,
            checkpoints: 2,
            adapters: 300_000,
            beside: BESIDE,
        };
        let said = need.refusal(Path::new("o"), 0, 1000);
        let parts = [
            "8.5 MB are needed",
            "4.0 MB for checkpoints, 2 at",
            "300.0 kB for the",
            "4.2 MB for figures",
        ];
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
        let said = need.refusal(Path::new("o"), 500_000, 1000);
        assert!(said.contains("8.0 MB are needed") && said.contains("500.0 kB of that being"));
    }
}
