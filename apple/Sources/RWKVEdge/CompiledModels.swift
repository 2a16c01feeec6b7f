#if canImport(CoreML)

import CoreML
import CryptoKit
import Foundation

/// Packages compiled once: an .mlpackage has to be compiled on the device before it can be loaded.
enum CompiledModels {
    /// Load one function of a package.
    static func load(_ graph: Manifest.Graph, of bundle: ModelBundle, units: MLComputeUnits, cache: URL?) async throws -> MLModel {
        var earlier = ""
        do {
            if let shipped = bundle.compiledModel(of: graph.file) {
                return try await load(graph, from: shipped, units)
            }
            let kept = try place(of: graph.file, in: bundle, cache: cache)
            if FileManager.default.fileExists(atPath: kept.path) {
                do {
                    return try await load(graph, from: kept, units)
                } catch {  // damaged, of another system, or out of memory this once: what is there is only replaced by a new one
                    try Task.checkCancellation()
                    earlier = ", and before it was compiled again: \(error.localizedDescription)"
                }
            }
            try keep(try await MLModel.compileModel(at: bundle.url(of: graph.file)), at: kept)
            return try await load(graph, from: kept, units)
        } catch let error where error is RWKVError || error is CancellationError {
            throw error
        } catch {
            throw RWKVError.model("Core ML cannot load \(graph.function) of \(graph.file): \(error.localizedDescription)\(earlier)")
        }
    }

    private static func load(_ graph: Manifest.Graph, from compiled: URL, _ units: MLComputeUnits) async throws -> MLModel {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        configuration.functionName = graph.function
        let model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        let about = model.modelDescription
        let isIts = fits(about.inputDescriptionsByName, graph.inputs) && fits(about.outputDescriptionsByName, graph.outputs)
        guard isIts, Set(about.stateDescriptionsByName.keys) == Set([graph.packed?.name].compactMap { $0 }) else {
            throw RWKVError.bundle("\(compiled.lastPathComponent) is not of this bundle's \(graph.file): compile that one again.")
        }
        return model
    }

    /// Whether a model has these inputs or outputs and no others.
    private static func fits(_ found: [String: MLFeatureDescription], _ expected: [Manifest.Value]) -> Bool {
        found.count == expected.count && expected.allSatisfy { found[$0.name]?.multiArrayConstraint?.shape.map(\.intValue) == $0.shape }
    }

    /// Remove every compiled model but those of some bundles.
    static func removeAll(except bundles: [ModelBundle], cache: URL?) throws {
        let files = FileManager.default
        let kept = try Set(bundles.flatMap { bundle in
            try bundle.manifest.graphs.map { try place(of: $0.file, in: bundle, cache: cache).lastPathComponent }
        })
        for file in try files.contentsOfDirectory(at: folder(cache), includingPropertiesForKeys: nil)
        where file.pathExtension == "mlmodelc" && !kept.contains(file.lastPathComponent) {
            try files.removeItem(at: file)
        }
    }

    /// Where the compiled package is kept: by the hashes of its files, so that another model is another place.
    static func place(of package: String, in bundle: ModelBundle, cache: URL?) throws -> URL {
        var hash = SHA256()
        for (name, about) in bundle.manifest.files.sorted(by: { $0.key < $1.key }) where name.hasPrefix(package + "/") {
            hash.update(data: Data("\(name) \(about.sha256)\n".utf8))
        }
        return try folder(cache).appendingPathComponent("\(hash.finalize().hex).mlmodelc")
    }

    private static func folder(_ given: URL?) throws -> URL {
        let files = FileManager.default
        var folder: URL
        if let given {
            folder = given
        } else {
            folder = try files.url(for: .applicationSupportDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
                .appendingPathComponent("rwkv-edge", isDirectory: true)
        }
        try files.createDirectory(at: folder, withIntermediateDirectories: true)
        var values = URLResourceValues()
        values.isExcludedFromBackup = true  // it can always be made again
        try? folder.setResourceValues(values)
        return folder
    }

    /// Move what Core ML has compiled to its place, where it appears whole or not at all.
    private static func keep(_ compiled: URL, at place: URL) throws {
        let files = FileManager.default
        let temporary = place.deletingLastPathComponent().appendingPathComponent("\(UUID().uuidString).mlmodelc")
        try files.moveItem(at: compiled, to: temporary)
        do {
            if files.fileExists(atPath: place.path) { try files.removeItem(at: place) }
            try files.moveItem(at: temporary, to: place)
        } catch {
            try? files.removeItem(at: temporary)
            if !files.fileExists(atPath: place.path) { throw error }  // otherwise somebody else was faster
        }
    }
}

#endif
