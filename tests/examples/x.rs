use tests::{artifacts::Artifacts, guest::*, vmm::Vmm, MIB};
fn main() -> anyhow::Result<()> {
    let a = Artifacts::load()?;
    let t = std::time::Instant::now();
    let mut g = Builder::new(&a, Vmm::Qemu).device(Device::QemuOwn).boot()?;
    eprintln!("boot {:?}", t.elapsed());
    let f = |g: &mut Guest, w: &str| {
        let m = g.mem_info().unwrap();
        eprintln!(
            "{:?} {w}: free {} avail {} host {}",
            t.elapsed(),
            m.free() >> 10,
            m.available() >> 10,
            g.memory_in_use().unwrap() >> 10
        )
    };
    f(&mut g, "boot");
    g.settled_free()?;
    f(&mut g, "settled");
    g.settled_free()?;
    f(&mut g, "settled");
    g.fill_and_free(24 * MIB, 1)?;
    f(&mut g, "filled");
    g.settled_free()?;
    f(&mut g, "settled");
    g.load(Driver::C)?;
    f(&mut g, "loaded");
    g.settled_free()?;
    f(&mut g, "settled");
    g.balloon()?.balloon(412 * MIB)?;
    for _ in 0..10 {
        let x = g.balloon()?.balloon_actual()?;
        f(&mut g, &format!("actual {}", x >> 20));
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    for l in g.kernel_log()? {
        if l.time_us > 4_000_000 {
            eprintln!("{} {}", l.time_us, l.text)
        }
    }
    g.power_off()?;
    Ok(())
}
