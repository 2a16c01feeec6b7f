#if canImport(CryptoKit)
    import CryptoKit
#endif
import Foundation

/// A bundle on disk, its manifest read and its files counted.
public struct ModelBundle: Sendable {
    public let folder: URL
    public let manifest: Manifest

    /// Read a bundle's manifest and compare its files' sizes with it.
    ///
    /// - Parameters:
    ///   - folder: with `manifest.json`
    ///   - verify: compare every file's sha256 as well: once after a download, not at every start
    public init(folder: URL, verify: Bool = false) throws {
        let data: Data
        do {
            data = try Data(contentsOf: folder.appendingPathComponent("manifest.json"))
        } catch {
            throw RWKVError.bundle("\(folder.lastPathComponent) has no manifest.json that can be read: it is not a bundle, or was copied in part.")
        }
        self.folder = folder
        manifest = try Manifest.decode(data)
        try checkFiles(verify: verify)
        try checkGraphs()
    }

    /// The place of a file of the bundle.
    public func url(of name: String) -> URL {
        folder.appendingPathComponent(name)
    }

    /// A compiled model that an app may ship beside a package, or in its place.
    func compiledModel(of package: String) -> URL? {
        let compiled = url(of: package).deletingPathExtension().appendingPathExtension("mlmodelc")
        return FileManager.default.fileExists(atPath: compiled.path) ? compiled : nil
    }

    private func checkFiles(verify: Bool) throws {
        let compiled = Set(manifest.graphs.map(\.file).filter { compiledModel(of: $0) != nil })
        for (name, about) in manifest.files.sorted(by: { $0.key < $1.key }) {
            let steps = name.split(separator: "/", omittingEmptySubsequences: false)
            if steps.contains(where: { $0.isEmpty || $0 == "." || $0 == ".." }) {
                throw RWKVError.bundle("The manifest names \(name), which is no place inside the bundle: export the bundle again.")
            }
            if let first = steps.first, compiled.contains(String(first)) { continue }  // the compiled model is what runs
            let file = url(of: name)
            let attributes = try? FileManager.default.attributesOfItem(atPath: file.path)
            guard let bytes = (attributes?[.size] as? NSNumber)?.intValue else {
                throw RWKVError.bundle("\(name) is missing from the bundle: copy it again.")
            }
            if bytes != about.bytes {
                throw RWKVError.bundle("\(name) has \(bytes) bytes, expected \(about.bytes): copy the bundle again.")
            }
            if verify, try Self.sha256(of: file) != about.sha256 {
                throw RWKVError.bundle("\(name) differs from what was exported: copy the bundle again.")
            }
        }
        for name in [manifest.tokenizer?.file, manifest.initialState].compactMap({ $0 }) where manifest.files[name] == nil {
            throw RWKVError.bundle("The manifest uses \(name) but does not list it under files: export the bundle again.")
        }
    }

    /// What later code relies on: sizes that can be, both functions of every part, and in each of them the whole state, once.
    private func checkGraphs() throws {
        let values = manifest.graphs.flatMap { $0.inputs + $0.outputs }
        let shapes = manifest.state.map(\.shape) + values.map(\.shape) + manifest.graphs.compactMap { $0.packed?.shape }
        let canBe = shapes.allSatisfy { shape in
            !shape.isEmpty && shape.allSatisfy { $0 >= 1 } && shape.reduce(1.0) { $0 * Double($1) } <= 0x1p32
        }
        guard manifest.spec.nVocab > 0, canBe else {
            throw RWKVError.bundle("The manifest states sizes that cannot be: export the bundle again.")
        }
        let numbers = manifest.graphs.map(\.part)
        guard let last = numbers.max(), (1...numbers.count).contains(last), Set(numbers) == Set(1...last) else {
            throw RWKVError.bundle("The manifest lists no graphs, or not all parts of the model: export the bundle again.")
        }
        for part in 1...last {
            let functions = manifest.graphs.filter { $0.part == part }
            guard functions.count == 2, Set(functions.map(\.function)) == ["decode", "prefill"], Set(functions.map(\.file)).count == 1 else {
                throw RWKVError.bundle("Part \(part) of the model does not have the functions decode and prefill: export the bundle again.")
            }
            guard functions[0].packed == functions[1].packed else {
                throw RWKVError.bundle("The two functions of part \(part) do not share one packed state: export the bundle again.")
            }
        }
        let folders = Set(manifest.files.keys.compactMap { $0.split(separator: "/").first.map(String.init) })
        for graph in manifest.graphs { try check(graph, folders) }
        let expected = manifest.state.map { "\($0.name) \($0.shape.reduce(1, *))" }.sorted()
        for function in ["decode", "prefill"] {
            let found = manifest.graphs.filter { $0.function == function }.flatMap(\.tensors).map { "\($0.name) \($0.count)" }
            guard found.sorted() == expected else {
                throw RWKVError.bundle("The parts of the model do not keep the state that the manifest lists: export the bundle again.")
            }
        }
    }

    private func check(_ graph: Manifest.Graph, _ folders: Set<String>) throws {
        guard folders.contains(graph.file) else {
            throw RWKVError.bundle("The manifest uses \(graph.file) but does not list it under files: export the bundle again.")
        }
        if graph.inputs.contains(where: { $0.name == "deep_embed" }) {
            throw RWKVError.unsupported("This is an RWKV-7a: its DeepEmbed tables are not read by this package yet.")
        }
        guard graph.state == "explicit" || graph.state == "packed" else {
            throw RWKVError.unsupported("\(graph.file) keeps its state as \(graph.state), which this release does not know: update the app.")
        }
        if let packed = graph.packed {
            let areRows = packed.shape.count == 3 && (0...1 << 24).contains(packed.firstLayer) && packed.rows.values.allSatisfy { range in
                range.count == 2 && 0 <= range[0] && range[0] < range[1] && range[1] <= packed.shape[1]
            }
            guard areRows else {
                throw RWKVError.bundle("The manifest's packed state is not (layers, rows, width): export the bundle again.")
            }
        }
        guard graph.nTokens >= 1, graph.function == "prefill" || graph.nTokens == 1 else {
            throw RWKVError.bundle("\(graph.function) of \(graph.file) takes \(graph.nTokens) tokens: export the bundle again.")
        }
    }

    /// The sha256 of a file, mapped: read in pieces, each would stay in memory until an autorelease pool is drained.
    static func sha256(of file: URL) throws -> String {
        guard let data = try? Data(contentsOf: file, options: .mappedIfSafe) else {
            throw RWKVError.bundle("\(file.lastPathComponent) cannot be read: copy the bundle again.")
        }
        var hash = SHA256()
        hash.update(data: data)
        return hash.finalize().hex
    }
}

extension SHA256Digest {
    /// As the manifest writes it.
    var hex: String {
        map { String(format: "%02x", $0) }.joined()
    }
}
