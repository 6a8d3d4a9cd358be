// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Target `config`: accesses to configuration space with any offset and length, between changes of features, of the
//! target and of the hint round.
//!
//! The target compares every read with a model that is written from the virtio specification, and checks that the device
//! afterwards serves an honest driver.

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use shared_abi::features::Features;
use vhost_device_balloon::device::Device;

use crate::guest::{device, ignore, rest_of, FeatureByte, Guest, LENGTH, PAGE, SECOND_LENGTH};

/// The most steps of one input.
const STEPS: usize = 64;

#[derive(Arbitrary, Debug)]
enum Number {
    /// Near the size of configuration space.
    Near(u8),
    Any(u32),
}

impl Number {
    fn resolve(&self) -> u32 {
        match *self {
            Self::Near(number) => u32::from(number % 20),
            Self::Any(number) => number,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Step {
    Read(Number, Number),
    Write(Number, Vec<u8>),
    Accept(FeatureByte),
    AcceptBits(u64),
    Reset,
    Target(u64),
    /// A target in pages below the size of guest memory.
    TargetPages(u8),
    StartHinting,
    SyncHinting,
    StopHinting,
    FinishHinting,
    Kick(u8),
}

/// Configuration space, as the specification describes it. The command id is taken from the device's saved state.
struct Model {
    offered: Features,
    negotiated: Option<Features>,
    num_pages: u32,
    actual: [u8; 4],
    poison_val: [u8; 4],
}

impl Model {
    fn size(&self) -> usize {
        let features = self.negotiated.unwrap_or(self.offered);
        if features.contains(Features::PAGE_POISON) {
            16
        } else if features.contains(Features::FREE_PAGE_HINT) {
            12
        } else {
            8
        }
    }

    fn bytes(&self, command_id: u32) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&self.num_pages.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.actual);
        bytes[8..12].copy_from_slice(&command_id.to_le_bytes());
        bytes[12..].copy_from_slice(&self.poison_val);
        bytes[self.size()..].fill(0);
        bytes
    }

    fn read(&self, command_id: u32, offset: u32, size: u32) -> Vec<u8> {
        let end = u64::from(offset) + u64::from(size);
        if end > 16 {
            return Vec::new();
        }
        self.bytes(command_id)[offset as usize..end as usize].to_vec()
    }

    fn write(&mut self, offset: u32, data: &[u8]) {
        let size = self.size() as u64;
        for (at, byte) in (u64::from(offset)..).zip(data) {
            match at {
                4..8 => self.actual[at as usize - 4] = *byte,
                12..16 if at < size => self.poison_val[at as usize - 12] = *byte,
                _ => {}
            }
        }
    }

    /// A driver that starts has no pages in its balloon.
    fn reset(&mut self) {
        self.actual = [0; 4];
        self.poison_val = [0; 4];
    }

    fn accept(&mut self, features: Features) {
        let features = features & self.offered;
        if self.negotiated.is_some_and(|before| before != features) {
            self.reset();
        }
        self.negotiated = Some(features);
    }
}

pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    // An input that is too short has few steps.
    let _ = play(&mut input);
}

fn play(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let offered = FeatureByte::arbitrary(input)?.features();
    let mut guest = Guest::new(device(offered, Arc::default()));
    guest.start_driver(offered, 16);
    let mut model = Model {
        offered,
        negotiated: Some(offered),
        num_pages: 0,
        actual: [0; 4],
        poison_val: [0; 4],
    };
    for step in rest_of::<Step>(input, STEPS) {
        step.play(&mut guest, &mut model);
        guest.free_retired();
        check(&mut guest.device, &model, 0, 16);
    }
    guest.check_honest_driver();
    Ok(())
}

impl Step {
    fn play(self, guest: &mut Guest, model: &mut Model) {
        let device = &mut guest.device;
        match self {
            Self::Read(offset, size) => check(device, model, offset.resolve(), size.resolve()),
            Self::Write(offset, data) => {
                device.write_config(offset.resolve(), &data);
                model.write(offset.resolve(), &data);
            }
            Self::Accept(features) => {
                device.set_features(features.features().bits());
                model.accept(features.features());
            }
            Self::AcceptBits(bits) => {
                device.set_features(bits);
                model.accept(Features::from_bits(bits));
            }
            Self::Reset => {
                device.reset();
                model.reset();
                model.negotiated = None;
            }
            Self::Target(bytes) => set_target(device, model, bytes),
            Self::TargetPages(pages) => set_target(device, model, u64::from(pages) * PAGE),
            Self::StartHinting => ignore(device.start_hinting()),
            Self::SyncHinting => ignore(device.sync_hinting()),
            Self::StopHinting => device.stop_hinting(),
            Self::FinishHinting => device.finish_hinting(),
            Self::Kick(index) => guest.kick(usize::from(index % 6)),
        }
    }
}

fn set_target(device: &mut Device, model: &mut Model, bytes: u64) {
    let result = device.set_target(bytes);
    assert_eq!(result.is_err(), bytes == 0, "{result:?}");
    if bytes != 0 {
        let pages = (LENGTH + SECOND_LENGTH).saturating_sub(bytes) / PAGE;
        model.num_pages = pages as u32;
    }
}

/// Compares a read with the model, and the size of the balloon.
fn check(device: &mut Device, model: &Model, offset: u32, size: u32) {
    let state = serde_json::to_value(device.saved_state()).expect("a saved state");
    let command_id = state["command-id"].as_u64().expect("a command id") as u32;
    let read = device.read_config(offset, size);
    assert_eq!(
        read,
        model.read(command_id, offset, size),
        "{size} bytes from offset {offset}"
    );
    let in_balloon = u64::from(u32::from_le_bytes(model.actual)) * PAGE;
    let expected = (LENGTH + SECOND_LENGTH).saturating_sub(in_balloon);
    assert_eq!(device.actual_size().expect("guest memory"), expected);
}
