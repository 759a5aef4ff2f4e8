//! A checkpoint on its way to the disk: shards in safetensors format, their
//! index, and the files that belong to a model beside its weights.
//!
//! Sizes are known before values are, so each shard's header is written first
//! and every tensor then at its place, in any order and in pieces: whoever
//! writes never holds more than a piece.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value, json};

use crate::config::Keys;
use crate::error::{Error, Result};
use crate::weights::{INDEX, SINGLE};

/// Bytes of a shard, as the Hugging Face libraries cut them.
pub(crate) const SHARD: u64 = 5_000_000_000;

/// A tensor that will be written.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Spec {
    fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// Where a tensor's next piece goes.
struct Place {
    shard: usize,
    at: u64,
    end: u64,
}

/// The weights of a checkpoint while they are written.
pub(crate) struct Writer {
    folder: PathBuf,
    shards: Vec<(PathBuf, File)>,
    places: BTreeMap<String, Place>,
    bytes: u64,
}

impl Writer {
    /// Starts the files for `specs`, cut in their order into shards of at most
    /// `limit` bytes (but for a tensor that is longer).
    pub fn create(folder: &Path, specs: &[Spec], limit: u64) -> Result<Self> {
        let mut cuts: Vec<Vec<&Spec>> = Vec::new();
        let mut room = 0;
        for spec in specs {
            let bytes = spec.bytes();
            match cuts.last_mut() {
                Some(shard) if bytes <= room => {
                    shard.push(spec);
                    room -= bytes;
                }
                _ => {
                    cuts.push(vec![spec]);
                    room = limit.saturating_sub(bytes);
                }
            }
        }
        let mut writer = Self {
            folder: folder.into(),
            shards: Vec::new(),
            places: BTreeMap::new(),
            bytes: specs.iter().map(Spec::bytes).sum(),
        };
        let count = cuts.len();
        for (number, specs) in cuts.into_iter().enumerate() {
            let name = match count {
                1 => SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            writer.start(folder.join(name), specs)?;
        }
        Ok(writer)
    }

    fn start(&mut self, path: PathBuf, mut specs: Vec<&Spec>) -> Result<()> {
        // Readers view a tensor's bytes as its type: widest first keeps all aligned.
        specs.sort_by_key(|spec| std::cmp::Reverse(spec.dtype.bitsize()));
        let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
        let mut ends = Vec::with_capacity(specs.len());
        let mut at = 0;
        for spec in &specs {
            let end = at + spec.bytes();
            let info = TensorInfo {
                dtype: spec.dtype,
                shape: spec.shape.clone(),
                data_offsets: (at as usize, end as usize),
            };
            header.insert(spec.name.clone(), json!(info));
            ends.push((at, end));
            at = end;
        }
        let mut text = Value::Object(header).to_string();
        text.extend(std::iter::repeat_n(
            ' ',
            text.len().next_multiple_of(8) - text.len(),
        ));

        let create = || {
            let mut file = File::create(&path)?;
            file.write_all(&(text.len() as u64).to_le_bytes())?;
            file.write_all(text.as_bytes())?;
            Ok(file)
        };
        let file = create().map_err(|source| unwritable(&path, source))?;
        let start = 8 + text.len() as u64;
        for (spec, (at, end)) in specs.into_iter().zip(ends) {
            let shard = self.shards.len();
            let place = Place {
                shard,
                at: start + at,
                end: start + end,
            };
            self.places.insert(spec.name.clone(), place);
        }
        self.shards.push((path, file));
        Ok(())
    }

    /// Writes the next bytes of a tensor.
    ///
    /// # Panics
    /// If there is no such tensor, or it is full.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let place = self
            .places
            .get_mut(name)
            .expect("a tensor that was announced");
        let (path, file) = &self.shards[place.shard];
        assert!(
            place.at + bytes.len() as u64 <= place.end,
            "bytes of {name}"
        );
        file.write_all_at(bytes, place.at)
            .map_err(|source| unwritable(path, source))?;
        place.at += bytes.len() as u64;
        Ok(())
    }

    /// Waits until all is on the disk, and writes the index of several shards.
    ///
    /// # Panics
    /// If a tensor is not complete.
    pub fn finish(self) -> Result<()> {
        let open = self.places.iter().find(|(_, place)| place.at != place.end);
        assert!(
            open.is_none(),
            "{} is not complete",
            open.map_or("", |(name, _)| name)
        );
        for (path, file) in &self.shards {
            file.sync_all().map_err(|source| unwritable(path, source))?;
        }
        if self.shards.len() > 1 {
            let file = |place: &Place| {
                let name = self.shards[place.shard].0.file_name();
                name.map(|name| name.to_string_lossy().into_owned())
            };
            let files: BTreeMap<_, _> = self
                .places
                .iter()
                .map(|(name, place)| (name, file(place)))
                .collect();
            let index = json!({"metadata": {"total_size": self.bytes}, "weight_map": files});
            save_json(&self.folder.join(INDEX), &index)?;
        }
        sync_folder(&self.folder)
    }
}

/// Copies what belongs to a model beside its weights (tokenizer, template,
/// generation settings, licence), and `config.json` with changes.
pub(crate) fn copy_companions(
    from: &Path,
    to: &Path,
    change: impl FnOnce(&mut Map<String, Value>),
) -> Result<()> {
    let unreadable = |source| Error::Read {
        path: from.into(),
        source,
    };
    for entry in fs::read_dir(from).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if path.is_file() && is_companion(name) {
            let target = to.join(name);
            fs::copy(&path, &target).map_err(|source| unwritable(&target, source))?;
        }
    }
    let mut config = Keys::read(from.join("config.json"))?.map;
    change(&mut config);
    save_json(&to.join("config.json"), &Value::Object(config))
}

fn is_companion(name: &str) -> bool {
    let weights = name.ends_with(".index.json") || name.starts_with("adapter_");
    let kinds = [".json", ".jinja", ".txt"];
    let legal = ["LICENSE", "NOTICE"];
    name != "config.json"
        && !weights
        && (kinds.iter().any(|kind| name.ends_with(kind))
            || legal.iter().any(|l| name.starts_with(l)))
}

fn save_json(path: &Path, value: &Value) -> Result<()> {
    let save = || {
        let mut file = File::create(path)?;
        serde_json::to_writer_pretty(&mut file, value)?;
        file.write_all(b"\n")?;
        file.sync_all()
    };
    save().map_err(|source| unwritable(path, source))
}

fn sync_folder(folder: &Path) -> Result<()> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|source| unwritable(folder, source))
}

/// Makes a folder through `fill`, which gets a sibling of it: the folder is
/// there whole or not at all. What an interrupted try left is removed.
///
/// # Errors
/// Those of `fill`, or of the disk.
pub(crate) fn whole_folder(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    // Of `model/` the name is `model`: put behind the slash, `.tmp` would be inside.
    let Some(name) = folder.file_name() else {
        return Err(unwritable(folder, ErrorKind::InvalidInput.into()));
    };
    let folder = &folder.with_file_name(name);
    let mut name = name.to_owned();
    name.push(".tmp");
    let part = folder.with_file_name(name);
    if part.exists() {
        fs::remove_dir_all(&part).map_err(|source| unwritable(&part, source))?;
    }
    fs::create_dir_all(&part).map_err(|source| unwritable(&part, source))?;
    let filled = fill(&part)
        .and_then(|()| sync_folder(&part))
        .and_then(|()| fs::rename(&part, folder).map_err(|source| unwritable(folder, source)));
    if filled.is_err() {
        // The work failed already; a leftover is no second failure.
        let _ = fs::remove_dir_all(&part);
    }
    filled
}

fn unwritable(path: &Path, source: std::io::Error) -> Error {
    Error::Write {
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use safetensors::SafeTensors;

    use super::*;

    fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> Spec {
        Spec {
            name: name.into(),
            dtype,
            shape: shape.into(),
        }
    }

    #[test]
    fn shards_are_read_back_whatever_the_order_of_writing() {
        let folder = tempfile::tempdir().unwrap();
        let specs = [
            spec("a", Dtype::U8, &[3]),
            spec("b", Dtype::F32, &[2, 2]),
            spec("c", Dtype::BF16, &[9]),
            spec("d", Dtype::F32, &[100]),
            spec("e", Dtype::U8, &[]),
        ];
        let bytes = |spec: &Spec| -> Vec<u8> {
            let first = spec.name.as_bytes()[0];
            (0..spec.bytes()).map(|i| i as u8 ^ first).collect()
        };
        let mut writer = Writer::create(folder.path(), &specs, 25).unwrap();
        for spec in specs.iter().rev() {
            for piece in bytes(spec).chunks(7) {
                writer.write(&spec.name, piece).unwrap();
            }
        }
        writer.finish().unwrap();

        let index = Keys::read(folder.path().join(INDEX)).unwrap().map;
        assert_eq!(index["metadata"]["total_size"], 3 + 16 + 18 + 400 + 1);
        // 3 + 16 bytes fit into 25; 18 more do not; 400 fit nowhere and stand alone.
        let shards = ["1", "1", "2", "3", "4"];
        for (spec, shard) in specs.iter().zip(shards) {
            let name = format!("model-0000{shard}-of-00004.safetensors");
            assert_eq!(index["weight_map"][&spec.name], json!(name));
            let file = fs::read(folder.path().join(name)).unwrap();
            let file = SafeTensors::deserialize(&file).unwrap();
            let tensor = file.tensor(&spec.name).unwrap();
            assert_eq!(
                (tensor.dtype(), tensor.shape()),
                (spec.dtype, &spec.shape[..])
            );
            assert!(tensor.data() == bytes(spec), "{}", spec.name);
        }
        // The wider type comes first, so that both are aligned.
        let header = fs::read(folder.path().join("model-00001-of-00004.safetensors")).unwrap();
        let (length, header) = SafeTensors::read_metadata(&header).unwrap();
        assert_eq!(length % 8, 0);
        assert_eq!(header.info("b").unwrap().data_offsets, (0, 16));
    }

    #[test]
    fn a_folder_is_there_whole_or_not_at_all() {
        let above = tempfile::tempdir().unwrap();
        let folder = above.path().join("model");
        let part = above.path().join("model.tmp");
        fs::create_dir(&part).unwrap();
        fs::write(part.join("of-a-killed-run"), "").unwrap();
        let fails = |part: &Path| {
            fs::write(part.join("half"), "").unwrap();
            Err(Error::file(part, "broke"))
        };
        assert!(whole_folder(&folder, fails).is_err());
        assert!(!folder.exists() && !part.exists());
        whole_folder(&folder, |part| {
            fs::write(part.join("whole"), "").unwrap();
            Ok(())
        })
        .unwrap();
        let names = |folder: &Path| -> Vec<_> {
            let names = fs::read_dir(folder).unwrap();
            let mut names: Vec<_> = names.map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&folder), ["whole"]);
        // A shell's completion puts a slash behind a folder's name.
        for name in ["slash/", "dot/."] {
            whole_folder(&above.path().join(name), |part| {
                fs::write(part.join("whole"), "").unwrap();
                Ok(())
            })
            .unwrap();
        }
        assert_eq!(names(above.path()), ["dot", "model", "slash"]);
        assert_eq!(names(&above.path().join("slash")), ["whole"]);
        let nowhere = whole_folder(&above.path().join("new/.."), |_| Ok(()));
        assert!(nowhere.is_err());
    }

    #[test]
    fn companions_are_neither_weights_nor_anything_else() {
        for name in [
            "tokenizer.json",
            "generation_config.json",
            "chat_template.jinja",
            "merges.txt",
            "LICENSE",
            "NOTICE",
        ] {
            assert!(is_companion(name), "{name}");
        }
        for name in [
            "config.json",
            "model.safetensors",
            INDEX,
            "README.md",
            "adapter_config.json",
            "pytorch_model.bin",
            "training_args.bin",
        ] {
            assert!(!is_companion(name), "{name}");
        }
    }
}
