#if canImport(CoreML)

import CoreML
import CryptoKit
import Foundation

/// Packages compiled once: an .mlpackage has to be compiled on the device before it can be loaded.
enum CompiledModels {
    /// Load one function of a package.
    static func load(_ package: String, function: String, of bundle: ModelBundle, units: MLComputeUnits, cache: URL?) async throws -> MLModel {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        configuration.functionName = function
        do {
            if let shipped = bundle.compiledModel(of: package) {
                return try await MLModel.load(contentsOf: shipped, configuration: configuration)
            }
            let kept = try place(of: package, in: bundle, cache: cache)
            if FileManager.default.fileExists(atPath: kept.path) {
                if let model = try? await MLModel.load(contentsOf: kept, configuration: configuration) {
                    return model
                }
                try FileManager.default.removeItem(at: kept)  // damaged, or of another system: once more
            }
            let compiled = try await MLModel.compileModel(at: bundle.url(of: package))
            try keep(compiled, at: kept)
            return try await MLModel.load(contentsOf: kept, configuration: configuration)
        } catch let error as RWKVError {
            throw error
        } catch {
            throw RWKVError.model("Core ML cannot load \(function) of \(package): \(error.localizedDescription)")
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
            try files.moveItem(at: temporary, to: place)
        } catch {
            try? files.removeItem(at: temporary)
            if !files.fileExists(atPath: place.path) { throw error }  // otherwise somebody else was faster
        }
    }
}

#endif
