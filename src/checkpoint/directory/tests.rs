use super::*;

#[test]
fn files_of_others_are_not_ours() {
    assert_eq!(Directory::generation("rows-12-0-of-2.safetensors"), Some(12));
    assert_eq!(Directory::generation("rows-3-1-of-2.safetensors.tmp"), Some(3));
    let others = [
        "rows-2024.safetensors",
        "rows-3-0-of-2-best.safetensors",
        "rows-2024-01-05.safetensors",
        "rows-03-0-of-2.safetensors",
        "rows-+3-0-of-2.safetensors",
        "rows-18446744073709551615-0-of-1.safetensors",
        "rows-3-0-of-2.safetensors.tmp.tmp",
        "rows-3-0-of-2.npy",
        "manifest.json",
    ];
    for name in others {
        assert_eq!(Directory::generation(name), None, "{name}");
    }
}
