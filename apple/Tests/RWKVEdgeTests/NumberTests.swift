#if canImport(CoreML)
    import CoreML
#endif
import Foundation
import XCTest

#if canImport(CryptoKit)
    import CryptoKit
#endif

@testable import RWKVEdge

final class NumberTests: XCTestCase {
    #if arch(arm64) || !os(macOS)
        func testHalvesAreThoseOfTheProcessor() {
            for bits in UInt16.min...UInt16.max {
                let expected = Float16(bitPattern: bits)
                let found = Half.float(bits)
                if expected.isNaN {
                    XCTAssertTrue(found.isNaN)
                } else {
                    XCTAssertEqual(found.bitPattern, Float(expected).bitPattern)
                    XCTAssertEqual(Half.bits(found), bits)
                }
            }
            var random = SplitMix64(seed: 1)
            for _ in 0..<100_000 {
                let value = Float(bitPattern: UInt32(truncatingIfNeeded: random.next()))
                if !value.isNaN { XCTAssertEqual(Half.bits(value), Float16(value).bitPattern) }
            }
            for value: Float in [65504, 65519.99, 65520, 65536, -65520, 2.980_232_2e-8, 2.980_232_3e-8, 6.1e-5, 1.000_488_3, 1.001_464_8] {
                XCTAssertEqual(Half.bits(value), Float16(value).bitPattern)
            }
        }
    #endif

    func testRows() {
        let rows = Rows(shape: [2, 2, 3], strides: [100, 10, 2])
        var starts: [Int] = []
        rows.forEach { starts.append($0) }
        XCTAssertEqual(starts, [0, 10, 100, 110])
        XCTAssertNoThrow(try rows.check(115))
        XCTAssertThrowsError(try rows.check(114))
        func read(_ n: Int) throws -> [Float] {
            try (0..<n).map { Int32($0) }.withUnsafeBufferPointer { try rows.read($0) { Float($0) } }
        }
        XCTAssertEqual(try read(115), [0, 2, 4, 10, 12, 14, 100, 102, 104, 110, 112, 114])
        XCTAssertThrowsError(try read(114))
    }

    func testSHA256() {
        func hex(_ pieces: [Data]) -> String {
            var hash = SHA256()
            for piece in pieces { hash.update(data: piece) }
            return hash.finalize().hex
        }
        XCTAssertEqual(hex([]), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        XCTAssertEqual(hex([Data("abc".utf8)]), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        for n in 54...66 {
            let whole = Data(repeating: 7, count: n)
            XCTAssertEqual(hex([whole]), hex([whole.prefix(n / 2), Data(whole.suffix(n - n / 2))]))
        }
    }

    #if canImport(CoreML)
        func testArraysRoundTrip() throws {
            let values: [Float] = (0..<24).map { Float($0) - 12.5 }
            for shape in [[24], [2, 12], [1, 2, 3, 4], [24, 1], [1, 24, 1, 1]] {
                XCTAssertEqual(try MLMultiArray.halves(values, shape: shape).floats(), values)
            }
            XCTAssertThrowsError(try MLMultiArray.halves(values, shape: [23]))
            XCTAssertEqual(try MLMultiArray.halves([1e30, -1e30, 65519], shape: [3]).floats(), [65504, -65504, 65504])
        }

        func testGapsBetweenRowsAreSteppedOver() throws {
            let memory = UnsafeMutablePointer<UInt16>.allocate(capacity: 64)
            defer { memory.deallocate() }
            for i in 0..<64 { memory[i] = Half.bits(Float(i)) }
            // (2, 3) where a row takes 32 elements
            let array = try MLMultiArray(
                dataPointer: UnsafeMutableRawPointer(memory), shape: [2, 3], dataType: .float16, strides: [32, 1], deallocator: nil)
            XCTAssertEqual(try array.floats(), [0, 1, 2, 32, 33, 34])
            try array.write([-1, -2, -3, -4, -5, -6])
            XCTAssertEqual([0, 2, 3, 31, 32, 34, 35].map { Half.float(memory[$0]) }, [-1, -3, 3, 31, -4, -6, 35])
        }

        func testTokens() throws {
            let array = try MLMultiArray.tokens([3, 1, 65535])
            XCTAssertEqual((0..<3).map { array[$0].intValue }, [3, 1, 65535])
        }
    #endif
}
