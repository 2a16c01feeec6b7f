#if canImport(CryptoKit)
    import CryptoKit
#endif
import Foundation

/// What a model remembers, as a document: bound to its model, at any width of its weights. The file: docs/bundle.md, "State files".
public struct SavedState: Sendable, Equatable {
    public struct Tensor: Sendable, Equatable {
        public let shape: [Int]
        /// Row-major; `wkv` as [head, value, key].
        public let values: [Float]

        public init(shape: [Int], values: [Float]) {
            self.shape = shape
            self.values = values
        }
    }

    public let modelID: String
    /// Tokens read so far.
    public let nTokens: Int
    /// `{layer}.{tensor}`
    public let tensors: [String: Tensor]
    /// After the last token: what going on begins with; nil where they are not known.
    public let logits: [Float]?
    /// Ids of the last tokens, at most 8, on which the text of the next one depends; of no use to another tokenizer.
    public let recent: [Int]
    /// The sha256 of the file of the tokenizer that they belong to; nil without them.
    public let tokenizer: String?
    /// Token -> how often it was generated, decayed, as penalties count; nil where none were on.
    public let occurrences: [Int: Double]?

    /// How many ids a state keeps.
    static let nRecent = 8
    static let key = "rwkv-edge state"

    private struct About: Codable {
        let modelID: String
        let nTokens: Int
        let sha256: String

        enum CodingKeys: String, CodingKey {
            case sha256
            case modelID = "model_id"
            case nTokens = "n_tokens"
        }
    }

    init(
        modelID: String, nTokens: Int, tensors: [String: Tensor], logits: [Float]?, recent: [Int] = [], tokenizer: String? = nil,
        occurrences: [Int: Double]? = nil
    ) {
        self.modelID = modelID
        self.nTokens = nTokens
        self.tensors = tensors
        self.logits = logits
        self.recent = recent
        self.tokenizer = tokenizer
        self.occurrences = occurrences
    }

    /// The first values that the manifest gives.
    init(firstOf manifest: Manifest) {
        var tensors: [String: Tensor] = [:]
        for tensor in manifest.state {
            let values = [Float](repeating: tensor.first, count: tensor.shape.reduce(1, *))
            tensors[tensor.name] = Tensor(shape: tensor.shape, values: values)
        }
        self.init(modelID: manifest.modelID, nTokens: 0, tensors: tensors, logits: nil)
    }

    /// Read a state file of a bundle's model.
    ///
    /// Throws `RWKVError.state` if it is missing, damaged, no state, or of another model.
    public init(contentsOf file: URL, manifest: Manifest) throws {
        guard let data = try? Data(contentsOf: file) else {
            throw RWKVError.state("\(file.lastPathComponent) is missing or cannot be read.")
        }
        try self.init(data, manifest: manifest, name: file.lastPathComponent)
    }

    init(_ data: Data, manifest: Manifest, name: String) throws {
        guard let read = Safetensors(data), let text = read.metadata[Self.key],
            let about = try? JSONDecoder().decode(About.self, from: Data(text.utf8)), about.nTokens >= 0
        else {
            throw RWKVError.state("\(name) is damaged or not a state file.")
        }
        guard about.modelID == manifest.modelID else {
            throw RWKVError.state(
                "\(name) belongs to another model (\(about.modelID.prefix(12))), not to this one (\(manifest.modelID.prefix(12))).")
        }
        guard Self.digest(read.tensors) == about.sha256 else {
            throw RWKVError.state("\(name) is damaged: its tensors are not the ones that were saved.")
        }
        var named = read.tensors
        let extras = try Extras(removedFrom: &named, name)
        guard named.values.allSatisfy({ ["F32", "F16"].contains($0.dtype) }) else {
            throw RWKVError.state("\(name) is damaged: its tensors are not the ones that were saved.")
        }
        var tensors = named.mapValues { Tensor(shape: $0.shape, values: $0.dtype == "F16" ? $0.data.halves : $0.data.floats) }
        let logits = tensors.removeValue(forKey: "logits")
        self.init(
            modelID: about.modelID, nTokens: about.nTokens, tensors: tensors, logits: logits?.values, recent: extras.recent,
            tokenizer: extras.tokenizer, occurrences: extras.occurrences)
        try check(manifest)
    }

    /// Write a state file in float32, whole or not at all, replacing a state file of that name and nothing else.
    ///
    /// Throws `RWKVError.state` if another file is there.
    public func write(to file: URL) throws {
        if FileManager.default.fileExists(atPath: file.path) {
            guard let old = try? Data(contentsOf: file, options: .mappedIfSafe), Safetensors(old)?.metadata[Self.key] != nil else {
                throw RWKVError.state("\(file.lastPathComponent) exists and is no state file: choose another name.")
            }
        }
        try encoded().write(to: file, options: .atomic)
    }

    func encoded() throws -> Data {
        var named = tensors.mapValues { Safetensors.Tensor(dtype: "F32", shape: $0.shape, data: Data(floats: $0.values)) }
        if let logits {
            named["logits"] = Safetensors.Tensor(dtype: "F32", shape: [logits.count], data: Data(floats: logits))
        }
        if !recent.isEmpty, let digest = tokenizer?.bytesOfHex {
            named[Extras.recentKey] = Safetensors.Tensor(dtype: "I32", shape: [recent.count], data: Data(ids: recent))
            named[Extras.tokenizerKey] = Safetensors.Tensor(dtype: "U8", shape: [digest.count], data: Data(digest))
        }
        if let occurrences, !occurrences.isEmpty {
            let ids = occurrences.keys.sorted()
            let counts = ids.map { Float(occurrences[$0] ?? 0) }
            named[Extras.seenKey] = Safetensors.Tensor(dtype: "I32", shape: [ids.count], data: Data(ids: ids))
            named[Extras.countsKey] = Safetensors.Tensor(dtype: "F32", shape: [ids.count], data: Data(floats: counts))
        }
        let about = try JSONEncoder().encode(About(modelID: modelID, nTokens: nTokens, sha256: Self.digest(named)))
        return try Safetensors(tensors: named, metadata: [Self.key: String(decoding: about, as: UTF8.self)]).encoded()
    }

    /// Throw `RWKVError.state` unless this is a state of the manifest's model: its tensors, their shapes, finite numbers.
    func check(_ manifest: Manifest) throws {
        guard modelID == manifest.modelID else {
            throw RWKVError.state("The state belongs to another model (\(modelID.prefix(12))), not to this one (\(manifest.modelID.prefix(12))).")
        }
        let sound = tensors.count == manifest.state.count && manifest.state.allSatisfy { expected in
            guard let found = tensors[expected.name], found.shape == expected.shape else { return false }
            return found.values.count == expected.shape.reduce(1, *) && found.values.allSatisfy(\.isFinite)
        }
        let ids = recent + (occurrences.map { Array($0.keys) } ?? [])
        guard sound, ids.allSatisfy({ (0..<manifest.spec.nVocab).contains($0) }), logits.map({ $0.count == manifest.spec.nVocab && $0.allSatisfy(\.isFinite) }) ?? true else {
            throw RWKVError.state("The state is damaged: its tensors are not those of this model, or not finite.")
        }
    }

    /// Over the tensors by name: the name, then the bytes.
    private static func digest(_ tensors: [String: Safetensors.Tensor]) -> String {
        var hash = SHA256()
        for (name, tensor) in tensors.sorted(by: { $0.key < $1.key }) {
            hash.update(data: Data(name.utf8))
            hash.update(data: tensor.data)
        }
        return hash.finalize().hex
    }
}

/// What a state file may have besides the tensors: both of a pair, or neither.
private struct Extras {
    static let recentKey = "recent.ids"
    static let tokenizerKey = "recent.tokenizer"
    static let seenKey = "occurrences.ids"
    static let countsKey = "occurrences.counts"

    var recent: [Int] = []
    var tokenizer: String?
    var occurrences: [Int: Double]?

    init(removedFrom tensors: inout [String: Safetensors.Tensor], _ name: String) throws {
        let damaged = RWKVError.state("\(name) is damaged: its tensors are not the ones that were saved.")
        var found: [Data?] = []
        for (key, dtype) in [(Self.recentKey, "I32"), (Self.tokenizerKey, "U8"), (Self.seenKey, "I32"), (Self.countsKey, "F32")] {
            let tensor = tensors.removeValue(forKey: key)
            if let tensor, tensor.dtype != dtype || tensor.shape.count != 1 { throw damaged }
            found.append(tensor?.data)
        }
        switch (found[0], found[1]) {
        case (nil, nil): break
        case (let ids?, let digest?):
            (recent, tokenizer) = (ids.ids, digest.map { String(format: "%02x", $0) }.joined())
            guard (1...SavedState.nRecent).contains(recent.count), digest.count == 32 else { throw damaged }
        default: throw damaged
        }
        switch (found[2], found[3]) {
        case (nil, nil): break
        case (let ids?, let counts?):
            let (seen, values) = (ids.ids, counts.floats)
            guard seen.count == values.count, !seen.isEmpty, zip(seen, seen.dropFirst()).allSatisfy({ $0 < $1 }),
                values.allSatisfy({ $0.isFinite && $0 >= 0 })
            else { throw damaged }
            occurrences = Dictionary(uniqueKeysWithValues: zip(seen, values.map { Double($0) }))
        default: throw damaged
        }
    }
}

extension String {
    /// The bytes that hexadecimal digits stand for; nil if they are none.
    fileprivate var bytesOfHex: [UInt8]? {
        let digits = utf8.compactMap { Character(Unicode.Scalar($0)).hexDigitValue }
        guard digits.count == utf8.count, digits.count % 2 == 0 else { return nil }
        return stride(from: 0, to: digits.count, by: 2).map { UInt8(digits[$0] << 4 | digits[$0 + 1]) }
    }
}
